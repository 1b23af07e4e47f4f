"""Control of resnet_fashion-mnist_denoiserep.py: the baseline, fine-tuned for 300 iterations without denoising."""

_base_ = './resnet_fashion-mnist.py'

load_from = 'work_dirs/resnet_fashion-mnist/iter_1000.pth'
train_cfg = dict(max_iters=300)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=300, T_max=300)]

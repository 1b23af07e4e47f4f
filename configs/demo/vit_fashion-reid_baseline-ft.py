"""Control of vit_fashion-reid_denoiserep.py: the small baseline, fine-tuned for 200 iterations without denoising."""

_base_ = './vit_fashion-reid.py'

load_from = 'work_dirs/vit_fashion-reid/iter_800.pth'
train_cfg = dict(max_iters=200)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=200, T_max=200)]

"""Control of the demo: the small baseline, fine-tuned for 120 iterations without denoising."""

_base_ = './mask-rcnn_swin_scenes.py'

load_from = 'work_dirs/demo/baseline/iter_800.pth'
train_cfg = dict(max_iters=120)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=120, T_max=120)]

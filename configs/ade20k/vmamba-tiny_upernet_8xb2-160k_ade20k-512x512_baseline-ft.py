"""Control of *_denoiserep.py: UPerNet VMamba-T, trained on without denoising.

Ours: 40,000 iterations at a tenth of the baseline's rate. What more training alone does to the segmentor is what this
config measures. Run vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py first.
"""

_base_ = './vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

load_from = 'work_dirs/vmamba-tiny_upernet_8xb2-160k_ade20k-512x512/iter_160000.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
max_iters = 40000
train_cfg = dict(max_iters=max_iters, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
optim_wrapper = dict(optimizer=dict(lr=6e-6))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False),
]

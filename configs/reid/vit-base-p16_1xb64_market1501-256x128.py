"""ViT-B/16 on Market-1501, 256 x 128 pixels, from ImageNet weights: the start of *_baseline-ft.py and *_denoiserep.py.

Ours, after TransReID's baseline, for which its authors give mAP 87.1 and rank-1 94.6.
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/vit-base-p16_reid.py',
    '../_base_/datasets/market1501_256x128.py',
    '../_base_/schedules/reid_sgd_120e.py',
    '../_base_/reid_runtime.py',
]

optim_wrapper = dict(optimizer=dict(lr=8e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=True, begin=5, end=120, T_max=115),
]

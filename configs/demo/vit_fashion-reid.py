"""A small ViT that finds articles again in the pictures of other cameras, trained from scratch on one CPU core.

Make the pictures first: python -m studies.make_reid work_dirs/fashion-reid
"""

_base_ = ['../_base_/datasets/fashion-reid.py', '../_base_/schedules/demo.py', '../_base_/demo_runtime.py']

custom_imports = dict(imports=['mmdenoiserep.tasks.reid'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ReIDVisionTransformer',
        arch=dict(embed_dims=96, num_layers=4, num_heads=4, feedforward_channels=192),
        img_size=(64, 48),
        patch_size=8,
    ),
    head=dict(type='BNNeckReIDHead', num_classes=500, in_channels=96),
)

train_cfg = dict(max_iters=800)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=800, T_max=750),
]

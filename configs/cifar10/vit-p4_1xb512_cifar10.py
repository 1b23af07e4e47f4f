"""The official ViT for CIFAR-10: width 512, 6 layers, 8 heads, MLP 512, patches of 4 pixels, dropout 0.1.

Model, augmentation, batch size and 300 epochs are the paper's (arXiv 2406.08773 and its official script), written with
mmpretrain's classes: its ViT has a bias on qkv, its RandAugment timm's list of operations. Adam at 1e-4 with a cosine
is what the official script continues with. The paper's number (official README): top-1 85.57.
Untested at full size: no result is claimed.
"""

_base_ = ['mmpretrain::_base_/datasets/cifar10_bs16.py', 'mmpretrain::_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=512, num_layers=6, num_heads=8, feedforward_channels=512),
        img_size=32,
        patch_size=4,
        drop_rate=0.1,
    ),
    neck=None,
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
)

train_pipeline = [
    dict(type='RandAugment', policies='timm_increasing', num_policies=2, total_level=30, magnitude_level=14),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=512, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=512)
test_dataloader = val_dataloader

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-4, weight_decay=0.0))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=True)
auto_scale_lr = dict(base_batch_size=512)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))

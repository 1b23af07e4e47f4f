"""CUB-200-2011 in crops of 256 pixels, with the crops of mmpretrain's config for 384."""

_base_ = 'mmpretrain::_base_/datasets/cub_bs8_384.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=340),
    dict(type='RandomCrop', crop_size=256),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=340),
    dict(type='CenterCrop', crop_size=256),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

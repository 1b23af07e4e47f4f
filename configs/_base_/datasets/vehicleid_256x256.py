"""VehicleID, its test set of 800 vehicles, in 256 x 256 pixels; the metric draws ten galleries."""

_base_ = './market1501_256x128.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandomCrop', crop_size=(256, 256), padding=10),
    dict(type='RandomErasing', erase_prob=0.5, mode='rand', fill_color=[127.5] * 3, fill_std=[127.5] * 3),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256), interpolation='bicubic'),
    dict(type='PackInputs', meta_keys=_base_.meta_keys),
]

train_dataloader = dict(dataset=dict(type='VehicleID', data_root='data/VehicleID_V1.0', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type='VehicleID', data_root='data/VehicleID_V1.0', size=800, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(trials=10)
test_evaluator = val_evaluator

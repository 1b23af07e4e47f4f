"""CUHK-03, new protocol, labeled boxes, in 256 x 128 pixels; the data set reads the images from its .mat file."""

_base_ = './market1501_256x128.py'

train_dataloader = dict(
    dataset=dict(type='CUHK03', data_root='data/cuhk03', style='labeled', pipeline=_base_.train_pipeline[1:])
)
val_dataloader = dict(
    dataset=dict(type='CUHK03', data_root='data/cuhk03', style='labeled', pipeline=_base_.test_pipeline[1:])
)
test_dataloader = val_dataloader

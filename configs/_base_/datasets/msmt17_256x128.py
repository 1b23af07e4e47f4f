"""MSMT17 in 256 x 128 pixels; its validation images are for training, as in TransReID-SSL."""

_base_ = './market1501_256x128.py'

train_dataloader = dict(dataset=dict(type='MSMT17', data_root='data/MSMT17'))
val_dataloader = dict(dataset=dict(type='MSMT17', data_root='data/MSMT17'))
test_dataloader = val_dataloader

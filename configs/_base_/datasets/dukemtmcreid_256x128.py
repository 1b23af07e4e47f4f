"""DukeMTMC-reID in 256 x 128 pixels; its authors have withdrawn the data set."""

_base_ = './market1501_256x128.py'

train_dataloader = dict(dataset=dict(type='DukeMTMCReID', data_root='data/dukemtmcreid'))
val_dataloader = dict(dataset=dict(type='DukeMTMCReID', data_root='data/dukemtmcreid'))
test_dataloader = val_dataloader

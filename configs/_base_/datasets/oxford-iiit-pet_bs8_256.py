"""Oxford-IIIT Pet in crops of 256 pixels."""

_base_ = './flowers102_bs8_256.py'

data_preprocessor = dict(num_classes=37)
train_dataloader = dict(dataset=dict(type='OxfordIIITPet', data_root='data/Oxford-IIIT_Pets'))
val_dataloader = dict(dataset=dict(type='OxfordIIITPet', data_root='data/Oxford-IIIT_Pets'))
test_dataloader = val_dataloader

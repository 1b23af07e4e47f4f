"""Oxford-IIIT Pet, 37 classes: trainval (3,680 images) to train, test (3,669) to evaluate."""

_base_ = './flowers102_bs8_224.py'

data_preprocessor = dict(num_classes=37)
train_dataloader = dict(dataset=dict(type='OxfordIIITPet', data_root='data/Oxford-IIIT_Pets'))
val_dataloader = dict(dataset=dict(type='OxfordIIITPet', data_root='data/Oxford-IIIT_Pets'))
test_dataloader = val_dataloader

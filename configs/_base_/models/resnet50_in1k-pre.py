"""ResNet-50 from its ImageNet-1k weights."""

_base_ = 'mmpretrain::_base_/models/resnet50.py'

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth'
model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone')))

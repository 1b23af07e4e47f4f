"""SwinV2-T with windows of 8 from its ImageNet-1k weights; for small data sets, without Mixup."""

_base_ = 'mmpretrain::_base_/models/swin_transformer_v2/tiny_256.py'

checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/swin-v2/'
    'swinv2-tiny-w8_3rdparty_in1k-256px_20220803-e318968f.pth'
)
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone')),
    head=dict(loss=dict(_delete_=True, type='CrossEntropyLoss')),
    train_cfg=None,
)

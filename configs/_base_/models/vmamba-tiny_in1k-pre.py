"""VMamba-T from its released ImageNet-1k weights."""

_base_ = ['./vmamba-tiny.py', './vmamba-tiny_weights.py']

model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=_base_.checkpoint)))

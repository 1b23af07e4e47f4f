"""Mask R-CNN VMamba-T on COCO: mmdet's Swin-T config with another backbone; the start of its two variants.

The release does the same, with drop path 0.2; its authors give box AP 47.3 and mask AP 42.7.
Untested at full size: no result is claimed.
"""

_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/models/vmamba-tiny_weights.py']

custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='VMamba',
        arch='tiny',
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=_base_.checkpoint),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'A_logs': dict(decay_mult=0.0), '.Ds': dict(decay_mult=0.0)}))

"""UPerNet VMamba-T on ADE20K: mmseg's Swin-T config with another backbone; the start of its two variants.

The release does the same, with drop path 0.2; its authors give mIoU 47.9, single scale.
Untested at full size: no result is claimed.
"""

_base_ = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/models/vmamba-tiny_weights.py',
]

custom_imports = dict(imports=['mmdenoiserep', 'mmdenoiserep.evaluation.boundary_iou'], allow_failed_imports=False)
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
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='BoundaryIoUMetric')]
test_evaluator = val_evaluator

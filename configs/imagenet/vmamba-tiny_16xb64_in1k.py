"""VMamba-T on ImageNet-1k, from scratch: the start of *_baseline-ft.py and *_denoiserep.py.

The recipe is that of the release, Swin's with averaged weights: 300 epochs of AdamW. Its authors give top-1 82.6.
Their checkpoint saves the training: ``python tools/model_converters/convert_checkpoint.py vmamba
vssm1_tiny_0230s_ckpt_epoch_264.pth work_dirs/vmamba-tiny_16xb64_in1k/epoch_300.pth``.
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/vmamba-tiny.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    head=dict(loss=dict(_delete_=True, type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
optim_wrapper = dict(
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(custom_keys={'A_logs': dict(decay_mult=0.0), '.Ds': dict(decay_mult=0.0)}),
)

"""Mask R-CNN VMamba-T on COCO with DenoiseRep: fine-tuned with denoisers on its Linear layers.

The method is the paper's (arXiv 2406.08773); the detector, targets, schedule and learning rates are ours.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './mask-rcnn_vmamba-tiny_fpn_1x_coco_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.01), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='linear'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

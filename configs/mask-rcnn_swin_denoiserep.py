"""Mask R-CNN Swin-T on COCO with DenoiseRep: the released detector, fine-tuned with denoisers on its MLPs.

The method and the MLP targets are the paper's (arXiv 2406.08773); schedule and learning rates are ours, because the
official repository has no code for detection. The control is mask-rcnn_swin_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./mask-rcnn_swin_baseline-ft.py', './_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

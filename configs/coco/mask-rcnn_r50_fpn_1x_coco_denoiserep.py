"""Mask R-CNN ResNet-50 on COCO with DenoiseRep: the released detector, fine-tuned with denoisers on its convolutions.

The method is the paper's (arXiv 2406.08773); the detector, schedule and learning rates are ours, because the official
repository has no code for detection. The base freezes the stem and the first stage, so they get no denoisers, and holds
all BatchNorm in eval mode, which stays so.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./mask-rcnn_r50_fpn_1x_coco_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='DenoiseRepBackbone',
        backbone=_base_.model.backbone,
        targets='conv2d',
        exclude=['conv1', r'layer1\..*'],
    ),
)
# Their gradient is limited (docs/settings.md), so that under SGD the rate of the other layers suits the denoisers.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

"""RetinaNet Swin-T on COCO with DenoiseRep: the trained detector, fine-tuned with denoisers on its MLPs.

The method and the MLP targets are the paper's (arXiv 2406.08773); the detector, schedule and learning rates are ours.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./retinanet_swin-t-p4-w7_fpn_1x_coco_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
# Their gradient is limited (docs/settings.md), so that under SGD the rate of the other layers suits the denoisers.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

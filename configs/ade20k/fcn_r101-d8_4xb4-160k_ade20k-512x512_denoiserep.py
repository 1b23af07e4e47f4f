"""FCN ResNet-101 on ADE20K with DenoiseRep: the released segmentor, fine-tuned with denoisers on its convolutions.

The method and the backbone are the paper's (arXiv 2406.08773); schedule and learning rates are ours, because the
official repository has no code for segmentation.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './fcn_r101-d8_4xb4-160k_ade20k-512x512_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.01), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='conv2d'),
)
# Their gradient is limited (docs/settings.md), so that under SGD the rate of the other layers suits the denoisers.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

"""ViT-B/16 on VehicleID with DenoiseRep: the baseline, fine-tuned with denoisers on its MLPs.

The method, the MLP targets and lambda 0.1 are the paper's (arXiv 2406.08773 and its official scripts); schedule and
learning rates are ours, since there is no official script for vehicles.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './vit-base-p16_4xb56_vehicleid-256x256_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.1), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

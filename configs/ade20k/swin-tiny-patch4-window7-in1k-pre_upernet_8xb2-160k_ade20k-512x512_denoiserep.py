"""UPerNet Swin-T on ADE20K with DenoiseRep: the released segmentor, fine-tuned with denoisers on its MLPs.

The method and the MLP targets are the paper's (arXiv 2406.08773); the segmentor, schedule and learning rates are ours.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.01), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=2.0, decay_mult=0.0)}))

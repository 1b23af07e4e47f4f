"""ViT-S/16 on MSMT17 with DenoiseRep: the baseline, fine-tuned with denoisers on its MLPs.

The method, the MLP targets, lambda 0.1, the schedule and the denoisers' rate (4 times the others') are the paper's
(arXiv 2406.08773 and its official scripts, which alternate between backbone and denoisers; here both are trained at
once). The official denoisers hold D, ours B = c1 D - (c3 - 1) I, for which the same rate is a faster one.
The paper's numbers (official README): mAP 66.3 without and 67.3 with DenoiseRep.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './vit-small-p16_1xb64_msmt17-256x128_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.1), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=4.0, decay_mult=0.0)}))

"""ViT-B/16 on ImageNet-1k with DenoiseRep: the released model, fine-tuned with denoisers on its MLPs.

The method, the MLP targets and lambda 0.01 are the paper's (arXiv 2406.08773); the schedule and the rate of the
denoisers are ours.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './deit-base_16xb64_in1k_baseline-ft.py'

custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='DenoiseLossHook', mode='joint', weight=0.01),
    dict(type='DenoiseFusionHook'),
]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
# 5e-5 at the peak: much more makes loss_denoise rise under AdamW (the official ratio, 4, is re-identification's, SGD)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

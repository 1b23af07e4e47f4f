"""VMamba-B on ImageNet-1k with DenoiseRep: the model, fine-tuned with denoisers on its Linear layers.

vmamba-tiny_16xb64_in1k_denoiserep.py says what is the paper's and what is ours.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './vmamba-base_16xb64_in1k_baseline-ft.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='DenoiseLossHook', mode='joint', weight=0.01),
    dict(type='DenoiseFusionHook'),
]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='linear'),
)
# 5e-5 at the peak: much more makes loss_denoise rise under AdamW (the official ratio, 4, is re-identification's, SGD)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

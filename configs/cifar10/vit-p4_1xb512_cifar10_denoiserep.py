"""The official ViT on CIFAR-10 with DenoiseRep: fine-tuned with denoisers on every Linear layer of the backbone.

The method, lambda 0.01 and the schedule are the paper's (arXiv 2406.08773 and its official script, which alternates
between backbone and denoisers; here both are trained at once). The official script denoises every Linear layer of its
model, the head too. Ours: the rate of the denoisers.
The paper's numbers (official README): top-1 85.57 without and 86.21 with DenoiseRep.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./vit-p4_1xb512_cifar10_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='linear'),
)
# 5e-5 at the start: much more makes loss_denoise rise under Adam (the official ratio, 4, is re-identification's, SGD)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

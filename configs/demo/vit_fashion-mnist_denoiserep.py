"""The small ViT, fine-tuned for 300 iterations with a denoiser on every embedding layer (joint mode).

Ours: the paper has no Fashion-MNIST. The denoisers learn at 5e-5.
"""

_base_ = ['./vit_fashion-mnist_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='all'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

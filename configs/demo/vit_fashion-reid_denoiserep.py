"""The small ViT for re-identification, fine-tuned for 200 iterations with denoisers on its MLPs (joint mode).

The MLP targets are the paper's, the rest is ours: the paper has no Fashion-MNIST. The denoisers learn at 5e-5.
"""

_base_ = './vit_fashion-reid_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.1), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

"""ResNet-50 on Market-1501 with DenoiseRep: the baseline, fine-tuned with denoisers on its 53 convolutions.

The method and lambda 0.1 are the paper's (arXiv 2406.08773 and its official scripts, which have no ResNet); schedule
and learning rates are ours.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './resnet50_1xb64_market1501-256x128_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.1), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='DenoiseRepBackbone',
        backbone=_base_.model.backbone,
        targets='conv2d',
        image_size=(256, 128),
    ),
)
# 3.5e-5: much more than 5e-5 makes loss_denoise rise under Adam (the official ratio, 4, is for SGD)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

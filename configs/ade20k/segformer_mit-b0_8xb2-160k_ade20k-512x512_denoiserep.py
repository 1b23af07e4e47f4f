"""SegFormer MiT-B0 on ADE20K with DenoiseRep: the released segmentor, fine-tuned with denoisers on its MLPs.

The method and the backbone are the paper's (arXiv 2406.08773); schedule and learning rates are ours, because the
official repository has no code for segmentation.
MiT's MLPs are 1x1 convolutions, which the preset 'mlp' (Linear layers) does not take: the pattern names both of each
block and leaves the depthwise 3x3 between them alone.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './segformer_mit-b0_8xb2-160k_ade20k-512x512_baseline-ft.py'

custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.01), dict(type='DenoiseFusionHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='DenoiseRepBackbone',
        backbone=_base_.model.backbone,
        targets=r'layers\.\d+\.1\.\d+\.ffn\.layers\.(0|4)',
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=2.0, decay_mult=0.0)}))

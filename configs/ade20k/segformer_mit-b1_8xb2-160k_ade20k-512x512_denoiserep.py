"""SegFormer MiT-B1 on ADE20K with DenoiseRep: the released segmentor, fine-tuned with denoisers on its MLPs.

segformer_mit-b0_8xb2-160k_ade20k-512x512_denoiserep.py says what is the paper's, what is ours, and what the pattern is.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = './segformer_mit-b1_8xb2-160k_ade20k-512x512_baseline-ft.py'

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

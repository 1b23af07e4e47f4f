"""The demo: the small baseline, fine-tuned for 120 iterations with denoisers on every embedding layer (joint mode).

The denoisers learn at 5e-5: with Adam a much larger rate overshoots, since most entries of the optimal B are near 1e-4.
120 iterations are a beginning: loss_denoise falls by some percent.
"""

_base_ = ['./mask-rcnn_swin_scenes_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(
        _delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='all', image_size=128
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

"""The demo: the small baseline, trained on for 150 iterations with denoisers on every embedding layer (joint mode).

The learning rate of the denoisers is higher than the paper's ratio of 4, because 150 iterations have to do.
"""

_base_ = ['./mask-rcnn_swin_baseline-ft_scenes.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(
        _delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='all', image_size=128
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=20.0, decay_mult=0.0)}))

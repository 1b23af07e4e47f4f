"""The small SegFormer, fine-tuned for 300 iterations with a denoiser on every embedding layer (joint mode).

Ours: the paper has no such scenes. The denoisers learn at 5e-5. The projections inside nn.MultiheadAttention are
skipped, since their own forward is never called.
"""

_base_ = ['./segformer_mit_scenes_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(
        _delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='all', image_size=128
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=0.5, decay_mult=0.0)}))

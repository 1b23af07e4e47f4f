"""ViT-B/16 on CUB-200-2011 with DenoiseRep: the baseline, fine-tuned with denoisers on its MLPs.

The method, the MLP targets, lambda 0.01 and the ratio of the denoisers' rate to the others' (4, from re-identification)
are the paper's (arXiv 2406.08773 and its official scripts); the schedule is ours. The official repository has no script
for this data set.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./deit-base_8xb8_cub-384px_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='mlp'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=4.0, decay_mult=0.0)}))

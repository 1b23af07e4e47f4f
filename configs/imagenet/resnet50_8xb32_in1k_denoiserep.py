"""ResNet-50 on ImageNet-1k with DenoiseRep: the released model, fine-tuned with denoisers on its 53 convolutions.

The method, lambda 0.01 and the ratio of the denoisers' rate to the others' (4, from re-identification) are the paper's
(arXiv 2406.08773 and its official scripts); the schedule is ours.
The denoisers' rate is 0.004. The correction B is stored, not D, and the loss is steep in B: its curvature grows with
1 / c1^2. The gradient of the denoisers is limited for that (docs/settings.md).
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./resnet50_8xb32_in1k_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='conv2d'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=4.0, decay_mult=0.0)}))

"""ResNet-50 on Flowers-102 with DenoiseRep: the baseline, fine-tuned with denoisers on its 53 convolutions.

The method, lambda 0.01 and the ratio of the denoisers' rate to the others' (4, from re-identification) are the paper's
(arXiv 2406.08773 and its official scripts); the schedule is ours. imagenet/resnet50_8xb32_in1k_denoiserep.py says why
the denoisers' rate is low: 0.004 here too.
The control is *_baseline-ft.py: all but the denoisers.
Untested at full size: no result is claimed.
"""

_base_ = ['./resnet50_8xb8_flowers102_baseline-ft.py', '../_base_/denoiserep.py']

model = dict(
    backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='conv2d'),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=4.0, decay_mult=0.0)}))

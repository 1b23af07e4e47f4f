"""ResNet-18 on CIFAR-10 with DenoiseRep: the released model, fine-tuned with denoisers on its convolutions.

A lazy config: the three names are imported, so custom_imports is not needed. model.backbone is assigned;
model.update(backbone=...) would merge the new dict into the one that it shall hold.
The method, lambda 0.01 and the ratio of the denoisers' rate to the others' (4, from re-identification) are the paper's
(arXiv 2406.08773 and its official scripts); the schedule is ours.
The control is *_baseline_ft.py: all but the denoisers. (A hyphen in its name could not be imported.)
Untested at full size: no result is claimed.
"""

from mmengine.config import read_base

from mmdenoiserep import DenoiseFusionHook, DenoiseLossHook, DenoiseRepBackbone

with read_base():
    from .resnet18_8xb16_cifar10_baseline_ft import *

custom_hooks = [dict(type=DenoiseLossHook, mode='joint', weight=0.01), dict(type=DenoiseFusionHook)]
model.backbone = dict(type=DenoiseRepBackbone, backbone=model.backbone, targets='conv2d', image_size=32)
optim_wrapper.update(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=4.0, decay_mult=0.0)}))

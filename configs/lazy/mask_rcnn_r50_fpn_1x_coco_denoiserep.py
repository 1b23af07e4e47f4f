"""Mask R-CNN ResNet-50 on COCO with DenoiseRep: the released detector, fine-tuned with denoisers on its convolutions.

The same settings as coco/mask-rcnn_r50_fpn_1x_coco_denoiserep.py, as a lazy config: the three names are imported, so
custom_imports is not needed. model.backbone is assigned; model.update(backbone=...) would merge the new dict into the
one that it shall hold.
The control is *_baseline_ft.py: all but the denoisers. (A hyphen in its name could not be imported.)
Untested at full size: no result is claimed.
"""

from mmengine.config import read_base

from mmdenoiserep import DenoiseFusionHook, DenoiseLossHook, DenoiseRepBackbone

with read_base():
    from .mask_rcnn_r50_fpn_1x_coco_baseline_ft import *

custom_hooks = [dict(type=DenoiseLossHook, mode='joint', weight=0.01), dict(type=DenoiseFusionHook)]
model.backbone = dict(
    type=DenoiseRepBackbone, backbone=model.backbone, targets='conv2d', exclude=['conv1', r'layer1\..*']
)
# Their gradient is limited (docs/settings.md), so that under SGD the rate of the other layers suits the denoisers.
optim_wrapper.update(paramwise_cfg=dict(custom_keys={'.denoiser.': dict(lr_mult=1.0, decay_mult=0.0)}))

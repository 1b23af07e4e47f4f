"""Control of *_denoiserep.py: the released ResNet-18 for CIFAR-10, trained on without denoising; a lazy config.

Ours: SGD at the rate that the base ends with, a cosine to 0, and 80 epochs, as for cifar10/resnet50_8xb16_cifar10.
The released checkpoint has top-1 94.82 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR

with read_base():
    from ._base_.resnet18_8xb16_cifar10 import *

load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet18_b16x8_cifar10_20210528-bd6371c8.pth'
model.update(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg.update(max_epochs=80)
optim_wrapper.update(optimizer=dict(lr=1e-3))
param_scheduler = dict(type=CosineAnnealingLR, by_epoch=True)

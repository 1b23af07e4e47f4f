"""Control of *_denoiserep.py: the released ResNet-50 for CIFAR-10, trained on without denoising.

Ours: SGD at the rate that the base ends with, a cosine to 0, and 80 epochs, the same share of the base's as in the
official SwinV2-T recipe.
The released checkpoint has top-1 95.55 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

_base_ = 'mmpretrain::resnet/resnet50_8xb16_cifar10.py'

load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_b16x8_cifar10_20210528-f54bfad9.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=80)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', by_epoch=True)

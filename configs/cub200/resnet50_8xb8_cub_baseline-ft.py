"""Control of *_denoiserep.py: the released ResNet-50 for CUB-200-2011, trained on without denoising.

Ours: a tenth of the base's first rate, a cosine to 0, and 40 epochs, the same share of the base's as in the official
SwinV2-T recipe.
The released checkpoint has top-1 88.45 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

_base_ = 'mmpretrain::resnet/resnet50_8xb8_cub.py'

load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb8_cub_20220307-57840e60.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=40)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True)]

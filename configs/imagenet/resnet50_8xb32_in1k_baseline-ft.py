"""Control of *_denoiserep.py: the released ResNet-50, trained on without denoising.

Ours: SGD at 1e-3, between the two last rates of the base (1e-3 and 1e-4), a cosine to 0, and 40 epochs, the same share
of the base's as in the official SwinV2-T recipe.
The released checkpoint has top-1 76.55 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=40)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', by_epoch=True)

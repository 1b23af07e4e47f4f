"""Control of *_denoiserep.py: our ResNet-50 for Flowers-102, trained on without denoising.

Ours: a tenth of the baseline's rate, a cosine to 0, and 40 epochs, the same share of the baseline's as in the official
SwinV2-T recipe. What more training alone does to the model is what this config measures.
Run resnet50_8xb8_flowers102.py first.
"""

_base_ = './resnet50_8xb8_flowers102.py'

load_from = 'work_dirs/resnet50_8xb8_flowers102/epoch_100.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=40)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True)]

"""Control of *_denoiserep.py: our VMamba-T for CUB-200-2011, trained on without denoising.

Ours: a tenth of the baseline's rate, a cosine to 0, and 40 epochs, the same share of the baseline's as in the official
SwinV2-T recipe. What more training alone does to the model is what this config measures.
Run vmamba-tiny_8xb8_cub-256px.py first.
"""

_base_ = './vmamba-tiny_8xb8_cub-256px.py'

load_from = 'work_dirs/vmamba-tiny_8xb8_cub-256px/epoch_100.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=40)
optim_wrapper = dict(optimizer=dict(lr=5e-6))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True)]

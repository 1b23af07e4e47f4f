"""Control of *_denoiserep.py: our ViT-B/16 for VehicleID, trained on without denoising.

Ours: 40 epochs of SGD at 1e-3 with a cosine. What more training alone does to the model is what this config measures.
Run vit-base-p16_4xb56_vehicleid-256x256.py first.
"""

_base_ = './vit-base-p16_4xb56_vehicleid-256x256.py'

load_from = 'work_dirs/vit-base-p16_4xb56_vehicleid-256x256/epoch_120.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=40)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True)]

"""Control of *_denoiserep.py: our ResNet-50 for Market-1501, trained on without denoising.

Ours: a tenth of the baseline's rate, a cosine to 0, and 60 epochs. What more training alone does to the model is what
this config measures. Run resnet50_1xb64_market1501-256x128.py first.
"""

_base_ = './resnet50_1xb64_market1501-256x128.py'

load_from = 'work_dirs/resnet50_1xb64_market1501-256x128/epoch_120.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=60)
optim_wrapper = dict(optimizer=dict(lr=3.5e-5))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True)]

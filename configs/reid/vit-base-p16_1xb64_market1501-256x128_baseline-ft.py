"""Control of *_denoiserep.py: our ViT-B/16 for Market-1501, trained on without denoising.

The official recipe for ViT-B, less the denoisers: 120 epochs of SGD at 1e-4 with a cosine, batches of 32 identities
with 4 images. What more training alone does to the model is what this config measures.
Run vit-base-p16_1xb64_market1501-256x128.py first.
"""

_base_ = './vit-base-p16_1xb64_market1501-256x128.py'

load_from = 'work_dirs/vit-base-p16_1xb64_market1501-256x128/epoch_120.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_dataloader = dict(batch_size=128, sampler=dict(num_ids=32))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=True, begin=20, end=120, T_max=100),
]
auto_scale_lr = dict(base_batch_size=128)

"""Control of *_denoiserep.py: our ViT-S/16 for DukeMTMC-reID, trained on without denoising.

The official recipe, less the denoisers: 240 epochs of SGD at 1e-4 with a cosine, batches of 32 identities with 4
images. What more training alone does to the model is what this config measures.
Run vit-small-p16_1xb64_dukemtmcreid-256x128.py first.
"""

_base_ = './vit-small-p16_1xb64_dukemtmcreid-256x128.py'

load_from = 'work_dirs/vit-small-p16_1xb64_dukemtmcreid-256x128/epoch_120.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_dataloader = dict(batch_size=128, sampler=dict(num_ids=32))
train_cfg = dict(max_epochs=240)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=True, begin=20, end=240, T_max=220),
]
auto_scale_lr = dict(base_batch_size=128)

"""SGD of TransReID-SSL's ViT-S: 120 epochs, 20 of them warm-up, a cosine to 0.002 of the rate; for batches of 64."""

train_cfg = dict(by_epoch=True, max_epochs=120, val_interval=20)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='SGD', lr=4e-4, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(bias_lr_mult=2.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=True, begin=20, end=120, T_max=100),
]
auto_scale_lr = dict(base_batch_size=64)

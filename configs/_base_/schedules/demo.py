"""Training from scratch for 1,000 iterations, for small models on a CPU."""

# The validation interval is never reached, so validation runs once, after the last iteration.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=10**9)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=1000, T_max=950),
]

"""mmpretrain's cub_bs64 schedule with AdamW, as in its swin-large_8xb8_cub-384px.py, with a higher learning rate."""

_base_ = 'mmpretrain::_base_/schedules/cub_bs64.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-5, weight_decay=0.0005),
    clip_grad=dict(max_norm=5.0),
)

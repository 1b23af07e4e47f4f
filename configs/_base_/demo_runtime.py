"""mmpretrain's runtime for short iteration-based trainings, with one checkpoint at the end."""

_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=10**9, save_last=True),
)
log_processor = dict(by_epoch=False, window_size=20)
randomness = dict(seed=0)

"""mmpretrain's runtime for small data sets: logs every 20 batches and keeps three checkpoints."""

_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=3))

"""mmpretrain's runtime for data sets of few images: a line of the log every 20 batches, three checkpoints kept."""

_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=3))

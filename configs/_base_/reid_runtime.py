"""mmpretrain's runtime, with the import of re-identification and a checkpoint every 20 epochs."""

_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['mmdenoiserep.tasks.reid'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(interval=20, max_keep_ckpts=3))

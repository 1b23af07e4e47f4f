"""Joint training with DenoiseRep; inherit it beside a config that defines neither of the two settings.

A config that inherits custom_hooks from elsewhere writes ``custom_hooks = [*_base_.custom_hooks, ...]`` instead.
"""

custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
custom_hooks = [
    dict(type='DenoiseLossHook', mode='joint', weight=0.01),
    dict(type='DenoiseFusionHook'),
]

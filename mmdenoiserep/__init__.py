"""DenoiseRep (arXiv 2406.08773) for OpenMMLab: train linear denoisers on a backbone, fold them into its weights.

The core needs torch and greenlet only. With mmengine installed, importing this package also registers
``DenoiseRepBackbone``, the hooks and the backbone ``VMamba`` in mmengine's root registries.
"""

from importlib.util import find_spec

from .core import (
    DenoiseConv2d,
    DenoiseLinear,
    Moments,
    NoiseSchedule,
    apply_denoiserep,
    closed_form,
    collect_moments,
    denoise_losses,
    fit_domain,
    fuse_checkpoint,
    fuse_model,
    fuse_state_dict,
    select_layers,
    solve_denoisers,
    verify_fusion,
)

__version__ = '0.2.0'
__all__ = [
    'DenoiseConv2d',
    'DenoiseLinear',
    'Moments',
    'NoiseSchedule',
    'apply_denoiserep',
    'closed_form',
    'collect_moments',
    'denoise_losses',
    'fit_domain',
    'fuse_checkpoint',
    'fuse_model',
    'fuse_state_dict',
    'select_layers',
    'solve_denoisers',
    'verify_fusion',
]

if find_spec('mmengine'):
    from .engine import DenoiseFusionHook, DenoiseLossHook, DenoiseRepBackbone, DenoiseVisHook
    from .models.vmamba import VMamba

    __all__ += ['DenoiseFusionHook', 'DenoiseLossHook', 'DenoiseRepBackbone', 'DenoiseVisHook', 'VMamba']

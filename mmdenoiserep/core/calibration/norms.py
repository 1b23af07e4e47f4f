"""Norms that can take the constant of a layer without a bias: in ``b`` before it, in the running mean behind it."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ADDS_BIAS_LAST = {'torch.nn.modules.normalization.LayerNorm', 'timm.layers.norm.LayerNorm'}
"""Classes whose forward is that of ``nn.LayerNorm``: the bias is added last, to the last dimension."""

SUBTRACTS_MEAN_FIRST = {
    'torch.nn.modules.batchnorm.BatchNorm1d',
    'torch.nn.modules.batchnorm.BatchNorm2d',
    'torch.nn.modules.batchnorm.BatchNorm3d',
    'torch.nn.modules.batchnorm.SyncBatchNorm',
    'mmengine.model.utils._BatchNormXd',
    'mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm',
    'timm.layers.norm_act.BatchNormAct2d',
}
"""Classes whose forward is that of ``nn.BatchNorm2d``, or a function of it alone: the mean is subtracted first."""


def find_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Returns all modules that are LayerNorms or BatchNorms, or derived from them, by name."""
    return {name: norm for name, norm in module.named_modules() if isinstance(norm, nn.LayerNorm | _BatchNorm)}


def taker(norm: nn.Module) -> Tensor | None:
    """Returns what takes a constant: the bias of a LayerNorm, the running mean of a BatchNorm; None without one."""
    if isinstance(norm, _BatchNorm):
        return norm._buffers.get('running_mean')
    return norm._parameters.get('bias')


def why_not_norm(norm: nn.Module) -> str:
    """Returns why the forward of a norm is not known to be the plain one; empty if it is."""
    kind = f'{type(norm).__module__}.{type(norm).__qualname__}'
    if kind not in ADDS_BIAS_LAST | SUBTRACTS_MEAN_FIRST:
        return f'{kind} may compute something else than the plain norm'
    if 'forward' in norm.__dict__:
        return 'its forward was replaced on the object'
    if norm._forward_pre_hooks:
        return 'it has a forward pre-hook, which may write its parameters'
    return ''

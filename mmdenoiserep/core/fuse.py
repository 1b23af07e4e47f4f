"""Folds denoisers into the weights of their layers: ``W' = W - W B``, ``b' = b - W b~``.

One function on state dicts serves live models, checkpoint files and the training hook.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .convert import fuse_before_deploy
from .denoiser import fold
from .errors import InputError
from .layers import DenoiseLayer, restore_layer

DENOISER_KEY = re.compile(r'(?P<layer>(?:.*\.)?)denoiser\.(?P<name>weight|scale|up|down|bias)')
"""Matches a whole state-dict key of a denoiser; ``layer`` is the prefix of the layer's own keys."""


PART = 2**19
"""Elements of a weight that are folded at a time: 4 MiB in float64, which the cache may hold."""


class FusionError(InputError, ValueError):
    """A state dict that can't be fused; the message names the key or the layer."""


def fuse_state_dict(state: Mapping[str, Tensor], changes: dict[str, float] | None = None) -> 'OrderedDict[str, Tensor]':
    """Returns the vanilla state dict with every denoiser folded in; the input is not changed.

    Everything is computed in float64 on the CPU and cast once to the dtype of the stored weight. Nothing is random:
    the same input gives the same bits.

    Args:
        state: Parameters by name, with ``<layer>.denoiser.*`` beside ``<layer>.weight`` and ``<layer>.bias``.
        changes: Gets the relative change of each weight, ``|W' - W| / |W|`` (Frobenius norm), by layer name.

    Returns:
        A new dict in the same order, without the denoisers; the entries of other layers are shared with the input.

    Raises:
        FusionError: There is no denoiser, a shape does not fit, or a value is not finite.
    """
    denoisers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := DENOISER_KEY.fullmatch(key):
            denoisers.setdefault(match['layer'], {})[match['name']] = value
    if not denoisers:
        raise FusionError('there is no denoiser in it (no key with .denoiser.), so there is nothing to fuse')

    fused = OrderedDict((key, value) for key, value in state.items() if not DENOISER_KEY.fullmatch(key))
    for layer, parameters in denoisers.items():
        if foreign := [key for key in fused if key.startswith(f'{layer}denoiser.')]:
            raise FusionError(f'{foreign[0]} is nothing that a denoiser of this package holds')
        name = layer.rstrip('.') or 'the model'
        weight, bias, change = _fold(name, state, layer, parameters)
        if changes is not None:
            changes[name] = change
        fused[f'{layer}weight'] = weight
        if bias is not None:
            fused[f'{layer}bias'] = bias
    if hasattr(state, '_metadata'):  # versions of the modules, which torch keeps beside the entries
        versions = ((key, value) for key, value in state._metadata.items() if not f'.{key}'.endswith('.denoiser'))
        fused._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return fused


def fuse_model(module: nn.Module) -> nn.Module:
    """Returns a vanilla copy of a denoised model with the denoisers folded into its weights.

    The copy has the classes, names, shapes and dtypes of the model before :func:`apply_denoiserep`.

    Args:
        module: A model with denoisers; it is not changed.

    Raises:
        FusionError: The model has no denoiser, or a value is not finite.
    """
    state = fuse_state_dict(module.state_dict())
    fused = copy.deepcopy(module)
    for name, child in fused.named_modules():
        if isinstance(child, DenoiseLayer):
            restore_layer(child)
            prefix = f'{name}.' if name else ''
            with torch.no_grad():
                for parameter, value in child.named_parameters(recurse=False):
                    value.copy_(state[f'{prefix}{parameter}'])
        if child.__dict__.get('switch_to_deploy') is fuse_before_deploy:
            del child.switch_to_deploy
        _drop_own_hooks(child)
    return fused


def _fold(name: str, state: Mapping[str, Tensor], prefix: str, parameters: dict) -> tuple[Tensor, Tensor | None, float]:
    """Returns the fused weight and bias of one layer and the change of its weight; a FusionError names the layer."""
    weight, bias = state.get(f'{prefix}weight'), state.get(f'{prefix}bias')
    if weight is None:
        raise FusionError(f'{name} has a denoiser but no weight; the file is incomplete')
    kinds = set(parameters) - {'bias'}
    if kinds not in ({'weight'}, {'scale', 'up', 'down'}):
        raise FusionError(f'the denoiser of {name} is incomplete: it has only {", ".join(sorted(parameters))}')
    if 'bias' in parameters and bias is None:
        raise FusionError(f'the denoiser of {name} has a bias, but the layer has none to fold it into')
    if not _fits(weight, bias, parameters):
        shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in parameters.items())
        raise FusionError(f'the denoiser of {name} ({shapes}) does not fit its weight {tuple(weight.shape)}')

    wide = {key: value.detach().double().cpu() for key, value in parameters.items()}
    folded = torch.empty_like(weight)
    shifted = None if bias is None else torch.empty_like(bias)
    change = size = 0.0
    groups = len(wide['weight'] if 'weight' in wide else wide['scale'])
    for part in _parts(weight, groups):
        before = _wide(weight[part])
        after, b = fold(before, None if bias is None else _wide(bias[part]), wide)
        folded[part] = after
        change += after.copy_(folded[part]).sub_(before).norm().item() ** 2
        size += before.norm().item() ** 2
        if shifted is not None and b is not None:
            shifted[part] = b
    if not _is_finite(folded) or (shifted is not None and not _is_finite(shifted)):
        for key, value in dict(weight=weight, bias=bias, **{f'denoiser.{k}': v for k, v in parameters.items()}).items():
            if value is not None and not _is_finite(value):
                raise FusionError(f'{name}.{key} holds NaN or Inf; fuse an earlier checkpoint')
        raise FusionError(f'the fused weight of {name} overflows {weight.dtype}; fuse in a wider dtype')
    return folded, shifted, (change / (size or 1)) ** 0.5


def _parts(weight: Tensor, groups: int) -> Iterator[slice]:
    """Yields ranges of outputs that are small enough to be folded in the cache; groups stay together."""
    outputs = len(weight)
    step = outputs if groups > 1 else max(1, PART // max(1, weight[:1].numel()))
    for start in range(0, outputs, step):
        yield slice(start, start + step)


def _wide(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def _fits(weight: Tensor, bias: Tensor | None, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the shapes are those of a denoiser of this layer: a Linear layer has one group."""
    matrix = parameters.get('weight', parameters.get('up'))
    if weight.dim() not in (2, 4) or matrix is None or matrix.dim() != 3 or not matrix.shape[0]:
        return False
    groups, size, rank = matrix.shape
    shapes = dict(weight=(groups, size, size), scale=(groups,), up=(groups, size, rank), down=(groups, rank, size))
    shapes['bias'] = (groups * size,)
    return (
        size == weight.shape[1]
        and weight.shape[0] % groups == 0
        and (weight.dim() == 4 or groups == 1)
        and (bias is None or bias.shape == weight.shape[:1])
        and all(value.shape == shapes[key] for key, value in parameters.items())
    )


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf; either would show in the extremes."""
    return not values.numel() or all(torch.isfinite(extreme).item() for extreme in torch.aminmax(values))


def _drop_own_hooks(module: nn.Module) -> None:
    package = __name__.partition('.')[0]
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [
            key for key, hook in hooks.items() if str(getattr(hook, '__module__', '')).startswith(f'{package}.')
        ]:
            del hooks[key]

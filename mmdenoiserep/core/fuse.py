"""Folds denoisers into the weights of their layers: ``W' = W - W B``, ``b' = b - W b~``.

One function on state dicts serves live models, checkpoint files and the training hook.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .convert import fuse_before_deploy
from .layers import DenoiseLayer, correction_matrix, restore_layer

DENOISER_KEY = re.compile(r'(?P<layer>(?:.*\.)?)denoiser\.(?P<name>weight|scale|up|down|bias)')
"""Matches a whole state-dict key of a denoiser; ``layer`` is the prefix of the layer's own keys."""


class FusionError(ValueError):
    """A state dict that can't be fused; the message is one sentence that names the key or the layer."""


def fuse_state_dict(state: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
    """Returns the vanilla state dict with every denoiser folded in; the input is not changed.

    Everything is computed in float64 on the CPU and cast once to the dtype of the stored weight. Nothing is random:
    the same input gives the same bits.

    Args:
        state: Parameters by name, with ``<layer>.denoiser.*`` beside ``<layer>.weight`` and ``<layer>.bias``.

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
        weight, bias = _fold(layer.rstrip('.') or 'the model', state, layer, parameters)
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


def _fold(name: str, state: Mapping[str, Tensor], prefix: str, parameters: dict) -> tuple[Tensor, Tensor | None]:
    """Returns the fused weight and bias of one layer, or raises a FusionError that names it."""
    weight, bias = state.get(f'{prefix}weight'), state.get(f'{prefix}bias')
    if weight is None:
        raise FusionError(f'{name} has a denoiser but no weight; the file is incomplete')
    kinds = set(parameters) - {'bias'}
    if kinds not in ({'weight'}, {'scale', 'up', 'down'}):
        raise FusionError(f'the denoiser of {name} is incomplete: it has only {", ".join(sorted(parameters))}')
    if 'bias' in parameters and bias is None:
        raise FusionError(f'the denoiser of {name} has a bias, but the layer has none to fold it into')
    for key, value in (('weight', weight), ('bias', bias), *((f'denoiser.{k}', v) for k, v in parameters.items())):
        if value is not None and not torch.isfinite(value).all():
            raise FusionError(f'{name}.{key} holds NaN or Inf; fuse an earlier checkpoint')

    wide = {key: value.detach().double().cpu() for key, value in parameters.items()}
    try:
        matrix = correction_matrix(wide)
        groups, size = matrix.shape[:2]
        if (weight.dim() == 2 and groups != 1) or any(
            len(value) != groups for key, value in wide.items() if key != 'bias'
        ):
            raise RuntimeError
        if bias is not None and bias.shape != weight.shape[:1]:
            raise RuntimeError
        # (groups, outputs of a group, inputs of a group, kernel taps); a Linear layer is one group with one tap
        blocks = weight.detach().double().cpu().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        if matrix.shape != (groups, blocks.shape[2], blocks.shape[2]):
            raise RuntimeError
        folded = (blocks - torch.einsum('gojk,gji->goik', blocks, matrix)).reshape(weight.shape)
        if 'bias' in wide:
            bias = bias.detach()  # type: ignore[union-attr]
            shift = torch.einsum('gojk,gj->go', blocks, wide['bias'].reshape(groups, size)).flatten()
            bias = (bias.double().cpu() - shift).to(bias)
    except (RuntimeError, IndexError, ValueError):
        shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in parameters.items())
        raise FusionError(f'the denoiser of {name} ({shapes}) does not fit its weight {tuple(weight.shape)}') from None
    folded = folded.to(weight)
    if not torch.isfinite(folded).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise FusionError(f'the fused weight of {name} overflows {weight.dtype}; fuse in a wider dtype')
    return folded, bias


def _drop_own_hooks(module: nn.Module) -> None:
    package = __name__.partition('.')[0]
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, '__module__', '').startswith(f'{package}.')]:
            del hooks[key]

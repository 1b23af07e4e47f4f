"""Folds the denoisers of a model or a state dict into the weights: ``W' = W - W B``, ``b' = b - W b~``."""

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..method.convert import REPARAMETERIZATIONS, refuse_reparameterization
from ..method.fold import FusionError, fold_layer
from ..method.layers import find_denoise_layers, forget_denoising, make_vanilla
from ..utils.storage import Storages, shared_parameters, storage_of

DENOISER_KEY = re.compile(r'(?P<layer>(?:.*\.)?)denoiser\.(?P<name>[^.]+)')
"""Matches a whole key that may belong to a denoiser; ``layer`` is the prefix of the keys of its layer."""

DIMENSIONS = dict(weight=3, scale=1, up=3, down=3, bias=1)
"""Number of dimensions of each parameter of a denoiser."""


def fuse_state_dict(state: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
    """Returns the vanilla state dict with every denoiser folded in; the input is not changed.

    Computes in float64 on the CPU and rounds once, to the dtype of the stored weight. Equal inputs give equal bits.

    Args:
        state: A state dict with ``<layer>.denoiser.*`` beside ``<layer>.weight`` and ``<layer>.bias``.

    Returns:
        A new dict in the same order, without the denoisers; the tensors of other layers are shared with the input.

    Raises:
        FusionError: There is no denoiser, a shape does not fit, a weight is shared with another layer, or a value is
            not finite.
    """
    return fuse_with_changes(state)[0]


def fuse_with_changes(state: Mapping[str, Tensor]) -> 'tuple[OrderedDict[str, Tensor], dict[str, float]]':
    """Fuses a state dict, see :func:`fuse_state_dict`, and measures the changes.

    Returns:
        The vanilla state dict; the relative change of each weight, ``|W' - W| / |W|`` (Frobenius norm), by layer name.
    """
    denoisers = find_denoisers(state)
    if not denoisers:
        own = next((f' ({key} is of another module)' for key in state if DENOISER_KEY.fullmatch(key)), '')
        raise FusionError(f'there is no denoiser in it{own}, so there is nothing to fuse')

    _refuse_shared(state, denoisers)
    ours = denoiser_keys(state)
    fused = OrderedDict((key, value) for key, value in state.items() if key not in ours)
    changes = {}
    for layer, parameters in denoisers.items():
        if foreign := [key for key in fused if key.startswith(f'{layer}denoiser.')]:
            raise FusionError(f'{foreign[0]} is no parameter of a denoiser of this package')
        name = layer.rstrip('.') or 'the model'
        weight, bias = state.get(f'{layer}weight'), state.get(f'{layer}bias')
        if not isinstance(weight, Tensor):
            raise FusionError(f'{name} has a denoiser but no weight; the file is incomplete')
        weight, bias, changes[name] = fold_layer(name, weight, bias, parameters)
        fused[f'{layer}weight'] = weight
        if bias is not None:
            fused[f'{layer}bias'] = bias
    if hasattr(state, '_metadata'):  # torch's versions of the modules
        gone = {f'{layer}denoiser' for layer in denoisers}
        versions = ((key, value) for key, value in state._metadata.items() if key not in gone)
        fused._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return fused, changes


def find_denoisers(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Returns the denoisers in a state dict.

    A model may have other modules called ``denoiser``, which are left out, see :func:`_is_denoiser`.

    Args:
        state: A state dict; values need not be tensors.

    Returns:
        By prefix of each layer, such as ``'head.'``, the tensors of its denoiser by name.
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if match := DENOISER_KEY.fullmatch(key):
            groups.setdefault(match['layer'], {})[match['name']] = value
    found = {}
    for layer, group in groups.items():
        ours = {name: value for name, value in group.items() if name in DIMENSIONS and isinstance(value, Tensor)}
        if ours and _is_denoiser(state.get(f'{layer}weight'), ours):
            found[layer] = ours
    return found


def denoiser_keys(state: Mapping[str, Any]) -> set[str]:
    """Returns the keys of all denoisers in a state dict, see :func:`find_denoisers`."""
    return {f'{layer}denoiser.{name}' for layer, group in find_denoisers(state).items() for name in group}


def _is_denoiser(weight: Any, entries: Mapping[str, Tensor]) -> bool:
    """Whether the entries ``denoiser.*`` of a layer come from a :class:`Denoiser`, complete or not.

    A :class:`Denoiser` belongs to a layer with a weight of 2 or 4 dimensions, and its own weight is a stack of square
    matrices. Without the weight of the layer, as in a damaged file, all entries must have the dimensions of a denoiser:
    such a file must not pass for a vanilla one.
    """
    matrix = entries.get('weight')
    if matrix is not None and (
        matrix.dim() in (1, 2, 4, 5) or (matrix.dim() == 3 and matrix.shape[1] != matrix.shape[2])
    ):
        return False  # the weight of a norm, a Linear layer or a convolution
    if isinstance(weight, Tensor):
        return weight.dim() in (2, 4) or matrix is not None or {'up', 'down'} <= set(entries)
    if any(value.dim() != DIMENSIONS[name] for name, value in entries.items()):
        return False
    if matrix is not None:
        groups, size, _ = matrix.shape  # an nn.Conv1d would have a bias of length `groups`
        return len(entries) == 1 or ('bias' in entries and size > 1 and len(entries['bias']) == groups * size)
    return {'up', 'down'} <= set(entries)


def _refuse_shared(state: Mapping[str, Any], denoisers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises a FusionError if a weight or bias that fusing changes shares memory with another entry.

    A layer with two names is allowed: its denoisers share memory too.
    """
    storages = Storages(state.items())
    memory = {layer: {key: storage_of(value) for key, value in group.items()} for layer, group in denoisers.items()}
    owners = {f'{layer}{name}': layer for layer in denoisers for name in ('weight', 'bias')}
    for key in sorted(owners.keys() & state.keys()):
        for other in storages.owners(state[key]) if isinstance(state[key], Tensor) else ():
            if other not in owners or memory[owners[other]] != memory[owners[key]]:
                raise FusionError(f'{key} is shared with {other} of another layer; exclude both from the targets')


def fuse_model(module: nn.Module) -> nn.Module:
    """Returns a vanilla copy of a denoised model with the denoisers folded into its weights.

    The copy has the classes, names, shapes and dtypes of the model before :func:`apply_denoiserep`. The state dict of
    the model need not be complete, and is not with LoRA.

    Args:
        module: A model with denoisers; it is not changed.

    Raises:
        FusionError: The model has no denoiser, a layer was pruned or parametrised after the conversion or shares its
            weight with another layer, a forward was replaced by a function that holds the model, or a value is not
            finite.
    """
    layers = find_denoise_layers(module)
    if not layers:
        raise FusionError('there is no denoiser in the model, so there is nothing to fuse')
    fused_parameters = {}
    shared = shared_parameters(module)
    for name, layer in layers.items():
        if any(id(parameter) in shared for parameter in layer.parameters(recurse=False)):
            raise FusionError(
                f'the weight or bias of {name or "the model"} is shared with another layer; '
                'exclude both from the targets'
            )
        fused_parameters[name] = layer.fused_parameters(name or 'the model')
    fused = _copy(module)
    for name, layer in find_denoise_layers(fused).items():
        make_vanilla(layer, fused_parameters[name])
    for name, child in fused.named_modules():
        for method in REPARAMETERIZATIONS:
            if child.__dict__.get(method) is refuse_reparameterization:
                delattr(child, method)
        forget_denoising(child)
        if _holds_denoise_layers(child.__dict__.get('forward')):
            raise FusionError(
                f'the forward of {name or "the model"} was replaced by a function that holds the denoised model, which '
                'no copy can leave; fuse its state dict (fuse_state_dict) and load that into the vanilla model'
            )
    return fused


def _copy(module: nn.Module) -> nn.Module:
    """Returns a deep copy of a model that may hold non-leaf tensors, as pruned and weight-normed layers do."""
    results = [
        value
        for part in module.modules()
        for value in part.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in results})


def _holds_denoise_layers(forward: Any) -> bool:
    """Whether the closure of a function holds a module with denoisers, which only the original model has."""
    held = []
    for cell in getattr(forward, '__closure__', None) or ():
        with suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return any(find_denoise_layers(value) for value in held if isinstance(value, nn.Module))

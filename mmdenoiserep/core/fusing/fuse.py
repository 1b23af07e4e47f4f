"""Folds denoisers into the weights of their layers: ``W' = W - W B``, ``b' = b - W b~``.

One function on state dicts serves live models, checkpoint files and the training hook.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..method.convert import MERGERS, fuse_before_deploy
from ..method.fold import FusionError, fold_layer
from ..method.layers import DenoiseLayer, forget_denoising, restore_layer
from ..utils.storage import Storages, shared_parameters, storage_of

DENOISER_KEY = re.compile(r'(?P<layer>(?:.*\.)?)denoiser\.(?P<name>[^.]+)')
"""Matches a whole state-dict key that may be one of a denoiser; ``layer`` is the prefix of the layer's own keys."""

DIMENSIONS = dict(weight=3, scale=1, up=3, down=3, bias=1)
"""Names of what a denoiser holds, and how many dimensions each has."""


def fuse_state_dict(state: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
    """Returns the vanilla state dict with every denoiser folded in; the input is not changed.

    Everything is computed in float64 on the CPU and cast once to the dtype of the stored weight. Nothing is random:
    the same input gives the same bits.

    Args:
        state: Parameters by name, with ``<layer>.denoiser.*`` beside ``<layer>.weight`` and ``<layer>.bias``.

    Returns:
        A new dict in the same order, without the denoisers; the entries of other layers are shared with the input.

    Raises:
        FusionError: There is no denoiser, a shape does not fit, a weight is shared with another layer, or a value is
            not finite.
    """
    return fold_state_dict(state)[0]


def fold_state_dict(state: Mapping[str, Tensor]) -> 'tuple[OrderedDict[str, Tensor], dict[str, float]]':
    """Does the same as :func:`fuse_state_dict`.

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
            raise FusionError(f'{foreign[0]} is nothing that a denoiser of this package holds')
        name = layer.rstrip('.') or 'the model'
        weight, bias = state.get(f'{layer}weight'), state.get(f'{layer}bias')
        if not isinstance(weight, Tensor):
            raise FusionError(f'{name} has a denoiser but no weight; the file is incomplete')
        weight, bias, changes[name] = fold_layer(name, weight, bias, parameters)
        fused[f'{layer}weight'] = weight
        if bias is not None:
            fused[f'{layer}bias'] = bias
    if hasattr(state, '_metadata'):  # versions of the modules, which torch keeps beside the entries
        gone = {f'{layer}denoiser' for layer in denoisers}
        versions = ((key, value) for key, value in state._metadata.items() if key not in gone)
        fused._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return fused, changes


def find_denoisers(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Returns the denoisers in a state dict: for the prefix of each layer, the tensors of its denoiser by name.

    A module of the user's own may be called ``denoiser`` as well. Ours stands beside the weight of a Linear layer or a
    convolution, and holds matrices for groups of channels: a weight of any but three dimensions is the user's, and so
    are kernels of ``nn.Conv1d``. Where the weight of the layer is missing, what looks like ours throughout is ours, so
    that a damaged file is not taken for a vanilla one.

    Args:
        state: Values by name, of which not all need to be tensors.
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
    """Returns the keys of a state dict that :func:`find_denoisers` finds; empty where it has no denoiser."""
    return {f'{layer}denoiser.{name}' for layer, group in find_denoisers(state).items() for name in group}


def _is_denoiser(weight: Any, entries: Mapping[str, Tensor]) -> bool:
    """Whether entries called ``denoiser.*`` are ours, damaged or not, and not those of a module of the user's."""
    matrix = entries.get('weight')
    if matrix is not None and (
        matrix.dim() in (1, 2, 4, 5) or (matrix.dim() == 3 and matrix.shape[1] != matrix.shape[2])
    ):
        return False  # a norm, a Linear layer, a convolution
    if isinstance(weight, Tensor):
        return weight.dim() in (2, 4) or matrix is not None or {'up', 'down'} <= set(entries)
    # without its layer: all of it has to look like ours
    if any(value.dim() != DIMENSIONS[name] for name, value in entries.items()):
        return False
    if matrix is not None:
        groups, size, _ = matrix.shape  # of nn.Conv1d, the bias would have one number for each of the first dimension
        return len(entries) == 1 or ('bias' in entries and size > 1 and len(entries['bias']) == groups * size)
    return {'up', 'down'} <= set(entries)


def _refuse_shared(state: Mapping[str, Any], denoisers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises a FusionError where a weight that is about to change is, in the same memory, that of another layer too.

    One layer under two names is fine: there the denoisers are the same memory as well.
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

    The copy has the classes, names, shapes and dtypes of the model before :func:`apply_denoiserep`. What its state dict
    holds plays no part: that of a LoRA model lacks most weights.

    Args:
        module: A model with denoisers; it is not changed.

    Raises:
        FusionError: The model has no denoiser, a layer was pruned or parametrised since or shares its weight with
            another one, a forward was replaced by a function that holds the model, or a value is not finite.
    """
    layers = {name: child for name, child in module.named_modules() if isinstance(child, DenoiseLayer)}
    if not layers:
        raise FusionError('there is no denoiser in the model, so there is nothing to fuse')
    folded = {}
    shared = shared_parameters(module)
    for name, layer in layers.items():
        if any(id(parameter) in shared for parameter in layer.parameters(recurse=False)):
            raise FusionError(
                f'the weight or bias of {name or "the model"} is shared with another layer; '
                'exclude both from the targets'
            )
        folded[name] = layer.folded(name or 'the model')
    fused = _copy(module)
    for name, values in folded.items():
        twin = fused.get_submodule(name)
        restore_layer(twin)  # type: ignore[arg-type]
        with torch.no_grad():
            for key, value in values.items():
                twin.get_parameter(key).copy_(value)
    for name, child in fused.named_modules():
        for method in MERGERS:
            if child.__dict__.get(method) is fuse_before_deploy:
                delattr(child, method)
        forget_denoising(child)
        if _calls_the_original(child.__dict__.get('forward')):
            raise FusionError(
                f'the forward of {name or "the model"} was replaced by a function that holds the denoised model, which '
                'no copy can leave; fuse its state dict (fuse_state_dict) and load that into the vanilla model'
            )
    return fused


def _copy(module: nn.Module) -> nn.Module:
    """Returns a deep copy, also of a model with pruned or weight-normed layers, which hold results of operations."""
    results = [
        value
        for part in module.modules()
        for value in part.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in results})


def _calls_the_original(forward: Any) -> bool:
    """Whether a function holds a module with denoisers, of which a fused model has none."""
    held = []
    for cell in getattr(forward, '__closure__', None) or ():
        with suppress(ValueError):  # a cell that is empty
            held.append(cell.cell_contents)
    held = [value for value in held if isinstance(value, nn.Module)]
    return any(isinstance(part, DenoiseLayer) for module in held for part in module.modules())

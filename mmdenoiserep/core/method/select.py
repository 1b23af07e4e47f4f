"""Selects the layers that targets match and that can be fused exactly, in execution order."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..utils.storage import shared_parameters
from .layers import DENOISE_CLASSES, Layer, find_denoise_layers, reserved_names
from .probe import Execution, probe_execution
from .targets import Target, Targets, compile_pattern, near_names, parse_targets

EXACT_CLASSES = {
    'torch.nn.modules.linear.Linear',
    'torch.nn.modules.conv.Conv2d',
    'mmcv.cnn.bricks.wrappers.Linear',
    'mmcv.cnn.bricks.wrappers.Conv2d',
}
"""The classes that can be converted: their forward is that of ``nn.Linear`` or ``nn.Conv2d``."""

EXACT_MODULES = {name.rpartition('.')[0] for name in EXACT_CLASSES}

FORWARDS = ('forward', '_conv_forward')
"""Methods that compute the output of a layer; they must be defined in :data:`EXACT_MODULES`."""


@dataclass(frozen=True)
class Selection:
    """The layers that targets match.

    Attributes:
        layers: The selected layers by name, in execution order.
        overrides: By layer name, the options of the first target that matches the layer.
        skipped: By layer name, why a matched layer can't be converted.
        failure: Why the model did not run on the example input, or an empty string. If it failed, the layers are in the
            order of registration.
    """

    layers: Mapping[str, Layer]
    overrides: Mapping[str, Mapping]
    skipped: Mapping[str, str]
    failure: str


def select_layers(
    module: nn.Module, targets: Targets = 'all', exclude: str | Sequence[str] = (), example_input: Any = None
) -> dict[str, Layer]:
    """Returns the layers of a model that can be fitted, or that can get a denoiser which fuses exactly.

    Args:
        module: The model, without denoisers; it is not changed.
        targets: A preset (``'mlp'``, ``'linear'``, ``'conv2d'``, ``'all'``), a regular expression that must match the
            whole name of a module, or a list of these.
        exclude: Regular expressions for the names of layers to leave out.
        example_input: Input of one forward pass, which shows the execution order; None takes one random image,
            (1, 3, 224, 224).

    Returns:
        The ``nn.Linear`` and ``nn.Conv2d`` layers of the model by name, first executed first.

    Raises:
        ValueError: The model has denoisers or lazy parameters, or an entry of targets or exclude is malformed or
            matches no layer.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 4))
        >>> list(select_layers(model, 'all', example_input=torch.zeros(1, 3, 8, 8)))
        ['0', '2']
    """
    return dict(find_layers(module, targets, exclude, example_input).layers)


def find_layers(
    module: nn.Module, targets: Targets, exclude: str | Sequence[str] = (), example_input: Any = None
) -> Selection:
    """Returns the layers of :func:`select_layers` with the options of their targets, and the skipped layers."""
    if find_denoise_layers(module):
        raise ValueError(
            'the model has denoisers already; convert a model once, with all its targets, or fuse it first (fuse_model)'
        )
    if any(map(is_lazy, module.parameters())):
        raise ValueError('the model has lazy parameters, which have no size yet; run it on an example input first')
    parsed = parse_targets(targets)
    excluded = [compile_pattern(text) for text in ([exclude] if isinstance(exclude, str) else exclude)]
    names = _layer_names(module)
    layers: dict[str, Any] = {aliases[0]: module.get_submodule(aliases[0]) for aliases in names}
    observed = {n: m for n, m in layers.items() if _owns_parameters(m) and 'forward' not in m.__dict__}
    execution = probe_execution(module, observed, example_input)
    shared = shared_parameters(module)
    obstacles = {name: _find_obstacle(layer, execution, shared) for name, layer in layers.items()}
    chosen, skipped = _match(names, layers, parsed, excluded, obstacles)
    if not execution.failure:
        position = {key: number for number, key in enumerate(execution.order)}
        chosen = dict(sorted(chosen.items(), key=lambda item: position[id(layers[item[0]])]))
    return Selection(
        {name: layers[name] for name in chosen},
        {name: target.overrides for name, target in chosen.items()},
        skipped,
        execution.failure,
    )


def _match(
    names: Sequence[Sequence[str]],
    layers: Mapping[str, nn.Module],
    targets: Sequence[Target],
    excluded: Sequence[re.Pattern],
    obstacles: Mapping[str, str],
) -> tuple[dict[str, Target], dict[str, str]]:
    """Returns the target of each selected layer, and the obstacle of each skipped layer, by the layer's first name.

    Raises:
        ValueError: A target matches no layer that can be denoised, or an entry of exclude matches no layer at all.
    """
    for pattern in excluded:
        if not any(pattern.fullmatch(alias) for aliases in names for alias in aliases):
            near = near_names(pattern.pattern, list(layers))
            raise ValueError(f'the entry {pattern.pattern!r} of exclude matches no layer{near}')
    chosen: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    matched: dict[Target, str] = {}
    for aliases in names:
        name, layer = aliases[0], layers[aliases[0]]
        entries = [t for t in targets if any(t.matches(alias, layer) for alias in aliases)]
        if not entries:
            continue
        if any(pattern.fullmatch(alias) for pattern in excluded for alias in aliases):
            reason = 'it is excluded'
        elif reason := obstacles[name]:
            skipped[name] = reason
        else:
            chosen[name] = entries[0]
        for entry in entries:
            matched[entry] = '' if not reason else matched.get(entry, f'; it matches {name}, but: {reason}')
    for entry in targets:
        hint = matched.get(entry, near_names(entry.text, list(layers)))
        if hint:
            raise ValueError(f'the target {entry.text!r} matches no layer that can be denoised{hint}')
    return chosen, skipped


def _layer_names(module: nn.Module) -> list[list[str]]:
    """Returns the names of every Linear and Conv2d layer; a layer that several modules hold has several names."""
    names: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, tuple(DENOISE_CLASSES)):
            names.setdefault(id(child), []).append(name)
    return list(names.values())


def _owns_parameters(layer: nn.Module) -> bool:
    """Whether the weight, and the bias if there is one, are parameters of the layer."""
    if not isinstance(layer._parameters.get('weight'), nn.Parameter):
        return False
    return isinstance(layer._parameters.get('bias'), nn.Parameter) or getattr(layer, 'bias', None) is None


def _find_obstacle(layer: nn.Module, execution: Execution, shared: Container[int]) -> str:
    """Returns why a layer can't get a denoiser that fuses exactly, or an empty string if it can."""
    if any(id(p) in shared for p in layer._parameters.values()):
        return 'its weight or bias is shared with another layer'
    if id(layer) in execution.bypassed:
        return 'bypassed: its weight or bias is used outside of its own forward'
    kind = f'{type(layer).__module__}.{type(layer).__qualname__}'
    if kind not in EXACT_CLASSES:
        return f'{kind} may compute something else than the plain layer'
    for name in FORWARDS:
        defined = getattr(type(layer), name, None)
        if name in layer.__dict__:
            return f'its {name} was replaced on the object'
        if defined is not None and getattr(defined, '__module__', '') not in EXACT_MODULES:
            return f'the {name} of its class was replaced'
    if not _owns_parameters(layer):
        return 'its weight or bias is not a parameter of its own (pruned, weight norm or a parametrisation)'
    parameters = [p for p in layer._parameters.values() if p is not None]
    if not all(type(p.data) is Tensor and p.is_floating_point() and p.layout is torch.strided for p in parameters):
        return 'its weight or bias is no ordinary tensor of floating-point numbers'
    if any(0 in (stride for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1) for p in parameters):
        return 'its weight or bias is expanded: several elements share memory'
    own = {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}
    if taken := reserved_names(layer) & (own | execution.attributes.get(id(layer), set())):
        return f'it has attributes that a denoised layer needs for itself: {", ".join(sorted(taken))}'
    if id(layer) in execution.without_hooks:
        return 'it is called by its forward, or with its input by keyword, which hooks on it do not see'
    if not execution.failure and id(layer) not in execution.order:
        return 'not executed on the dummy image'
    return ''

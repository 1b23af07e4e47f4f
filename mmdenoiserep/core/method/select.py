"""Finds the layers that the method can work on: those that targets match, in the order of execution."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..utils.storage import shared_parameters
from .layers import DENOISE_CLASSES, DenoiseLayer, Layer, reserved_names
from .probe import Execution, probe_execution
from .targets import Target, Targets, compile_pattern, near_names, parse_targets

EXACT_CLASSES = {
    'torch.nn.modules.linear.Linear',
    'torch.nn.modules.conv.Conv2d',
    'mmcv.cnn.bricks.wrappers.Linear',
    'mmcv.cnn.bricks.wrappers.Conv2d',
}
"""The classes that are converted: those whose forward is the plain layer's. Others may compute something else."""

PLAIN_MODULES = {name.rpartition('.')[0] for name in EXACT_CLASSES}

FORWARDS = ('forward', '_conv_forward')
"""What computes the output of a layer: as its class defines it there, or the layer is no plain one."""

OPTIONS = ('rank', 'bias')
"""Options of a denoiser that an entry of ``targets`` may override."""


@dataclass(frozen=True)
class Selection:
    """What targets and one run on a dummy image chose.

    Attributes:
        layers: The chosen layers by name, first executed first.
        overrides: The options of the target that chose a layer, by its name.
        skipped: Why a layer was matched by a target and left as it is, by its name.
        failure: Why the model could not be run on the dummy image, else empty; the order is then that of registration.
    """

    layers: Mapping[str, Layer]
    overrides: Mapping[str, Mapping]
    skipped: Mapping[str, str]
    failure: str


def select_layers(
    module: nn.Module, targets: Targets = 'all', exclude: str | Sequence[str] = (), example_input: Any = None
) -> dict[str, Layer]:
    """Returns the layers of a model that can be fitted or get a denoiser, exactly.

    Args:
        module: The model, without denoisers; it is not changed.
        targets: A preset (``'mlp'``, ``'linear'``, ``'conv2d'``, ``'all'``), a regular expression that must match the
            whole name of a module, or a list of these.
        exclude: Regular expressions for names that are left out.
        example_input: What to call the module with, to see what runs; None takes one random image, (1, 3, 224, 224).

    Returns:
        Name: the ``nn.Linear`` or ``nn.Conv2d`` itself, first executed first.

    Raises:
        ValueError: The model has denoisers or lazy parameters, an entry of targets or exclude is malformed or matches
            nothing that it could.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 4))
        >>> list(select_layers(model, 'all', example_input=torch.zeros(1, 3, 8, 8)))
        ['0', '2']
    """
    return dict(find_layers(module, targets, exclude, example_input).layers)


def find_layers(
    module: nn.Module, targets: Targets, exclude: str | Sequence[str] = (), example_input: Any = None
) -> Selection:
    """Does the same as :func:`select_layers`; returns what was left out, and why, too."""
    if any(isinstance(m, DenoiseLayer) for m in module.modules()):
        raise ValueError(
            'the model has denoisers already; convert a model once, with all its targets, or fuse it first (fuse_model)'
        )
    if any(map(is_lazy, module.parameters())):
        raise ValueError('the model has lazy parameters, which have no size yet; run it on an example input first')
    parsed = parse_targets(targets, OPTIONS)
    excluded = [compile_pattern(text) for text in ([exclude] if isinstance(exclude, str) else exclude)]
    names = _layer_names(module)
    layers: dict[str, Any] = {aliases[0]: module.get_submodule(aliases[0]) for aliases in names}
    execution = probe_execution(
        module, {n: m for n, m in layers.items() if _own_parameters(m) and 'forward' not in m.__dict__}, example_input
    )
    shared = shared_parameters(module)
    chosen, skipped = _choose(names, layers, parsed, excluded, lambda layer: _why_not(layer, execution, shared))
    if not execution.failure:
        position = {key: place for place, key in enumerate(execution.order)}
        chosen = dict(sorted(chosen.items(), key=lambda item: position[id(layers[item[0]])]))
    return Selection(
        {name: layers[name] for name in chosen},
        {name: target.overrides for name, target in chosen.items()},
        skipped,
        execution.failure,
    )


def _choose(
    names: Sequence[Sequence[str]],
    layers: Mapping[str, nn.Module],
    targets: Sequence[Target],
    excluded: Sequence[re.Pattern],
    why_not: Callable[[nn.Module], str],
) -> tuple[dict[str, Target], dict[str, str]]:
    """Returns the layers to convert with their target, and the matched layers that can't be, with the reason.

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
        elif reason := why_not(layer):
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
    """Returns the names of every Linear and Conv2d; a layer that stands in several places has several."""
    names: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, tuple(DENOISE_CLASSES)):
            names.setdefault(id(child), []).append(name)
    return list(names.values())


def _own_parameters(layer: nn.Module) -> bool:
    """Whether the weight and the bias, where there is one, are parameters of the layer."""
    if not isinstance(layer._parameters.get('weight'), nn.Parameter):
        return False
    return isinstance(layer._parameters.get('bias'), nn.Parameter) or getattr(layer, 'bias', None) is None


def _why_not(layer: nn.Module, execution: Execution, shared: Container[int]) -> str:
    """Returns why a layer can't get a denoiser that fuses exactly; empty if it can."""
    if any(id(p) in shared for p in layer._parameters.values()):
        return 'its weight or bias is shared with another layer'
    if id(layer) in execution.bypassed:
        return 'bypassed: its weight or bias is used outside of its own forward'
    vanilla = f'{type(layer).__module__}.{type(layer).__qualname__}'
    if vanilla not in EXACT_CLASSES:
        return f'{vanilla} may compute something else than the plain layer'
    for name in FORWARDS:
        defined = getattr(type(layer), name, None)
        if name in layer.__dict__:
            return f'its {name} was replaced on the object'
        if defined is not None and getattr(defined, '__module__', '') not in PLAIN_MODULES:
            return f'the {name} of its class was replaced'
    if not _own_parameters(layer):
        return 'its weight or bias is not a parameter of its own (pruned, weight norm or a parametrisation)'
    if not all(_is_ordinary(p) for p in layer._parameters.values() if p is not None):
        return 'its weight or bias is no ordinary tensor of floating-point numbers'
    own = {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}
    if taken := reserved_names(layer) & (own | execution.attributes.get(id(layer), set())):
        return f'it has attributes that a denoised layer needs for itself: {", ".join(sorted(taken))}'
    if id(layer) in execution.past_hooks:
        return 'it is called by its forward, or with its input by keyword, which hooks on it do not see'
    if not execution.failure and id(layer) not in execution.order:
        return 'not executed on the dummy image'
    return ''


def _is_ordinary(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is Tensor and parameter.is_floating_point() and parameter.layout is torch.strided

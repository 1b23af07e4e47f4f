"""Puts denoisers onto the target layers of a model, in place, and reports what was done."""

import inspect
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .denoiser import DEFAULT_RANK
from .layers import DENOISE_CLASSES, DenoiseLayer, convert_layer, reserved_names, restore_layer
from .probe import Execution, probe_execution
from .schedule import NoiseSchedule
from ..utils.storage import shared_parameters
from ..utils.table import format_table
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

MERGERS = ('switch_to_deploy', 'merge_kernel', 'local_inject', 'reparameterize', 'fuse')
"""Methods that merge the weights of branches and norms, and make new layers of them."""


@dataclass(frozen=True)
class ConvertedLayer:
    """One row of the report: a layer that got a denoiser."""

    name: str
    type: str
    shape: tuple[int, ...]
    timestep: int
    extra_parameters: int


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`apply_denoiserep` did.

    Attributes:
        layers: The converted layers, first executed first.
        skipped: Name and reason of every layer that was matched by a target and left as it is.
        order: ``'execution'``, or ``'registration'`` where the model could not be run on the dummy image.
        probe_failure: Why it could not, else empty.
        parameters: Parameters of the model before the conversion.
    """

    layers: tuple[ConvertedLayer, ...]
    skipped: Mapping[str, str]
    order: str
    probe_failure: str
    parameters: int

    @property
    def extra_parameters(self) -> int:
        """Parameters that the denoisers add until they are fused."""
        return sum(layer.extra_parameters for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            (row.name, row.type, 'x'.join(map(str, row.shape)), str(row.timestep), f'{row.extra_parameters:,}')
            for row in self.layers
        ]
        lines = [
            format_table(('layer', 'type', 'weight', 'step', 'extra parameters'), rows),
            f'{len(self.layers)} layers denoised, steps {len(self.layers)} to 1 in {self.order} order; '
            f'{self.extra_parameters:,} extra parameters ({self.extra_parameters / max(self.parameters, 1):.1%}) '
            'until they are fused',
        ]
        if self.probe_failure:
            lines.append(
                'warning: the dummy run failed, so the order is the one of registration, and layers that the forward '
                f'bypasses were not looked for ({self.probe_failure})'
            )
        if self.skipped:
            lines += ['skipped:', format_table(('layer', 'reason'), sorted(self.skipped.items()))]
        return '\n'.join(lines)


def apply_denoiserep(
    module: nn.Module,
    targets: Targets,
    exclude: str | Sequence[str] = (),
    *,
    rank: int | None = DEFAULT_RANK,
    bias: bool | None = None,
    schedule: NoiseSchedule | None = None,
    example_input: Any = None,
) -> ConversionReport:
    """Gives every target layer of a model a denoiser on its input, in place.

    Timesteps count down in execution order: the first of N layers gets t = N, the last one t = 1. The order comes from
    one run on a dummy image, which also finds the layers that are never called or whose weight a parent reads by
    itself (``nn.MultiheadAttention``, SwinV2's ``qkv``): those can't be fused exactly and are skipped, as is every
    layer that is not plainly one of its class.

    Args:
        module: The model; it stays the same object, and every parameter keeps its name.
        targets: A preset (``'mlp'``, ``'linear'``, ``'conv2d'``, ``'all'``), a regular expression that must match the
            whole name of a module, ``dict(pattern=..., rank=..., bias=...)``, or a list of these; the first entry that
            matches a layer decides its options.
        exclude: Regular expressions for names that stay as they are.
        rank: Rank of the denoisers, None for full; where a group has no more channels, it is full.
        bias: None gives a denoiser a bias wherever that fuses exactly, False nowhere, True everywhere or not at all.
        schedule: Defaults to the official :class:`NoiseSchedule`.
        example_input: What to call the module with; None takes one random image, (1, 3, 224, 224).

    Returns:
        A :class:`ConversionReport`; ``print`` it for a table.

    Raises:
        ValueError: The module has denoisers already or lazy parameters, an entry of targets or exclude is malformed, an
            entry of targets matches no convertible layer or one of exclude no layer at all, an option does not fit a
            layer, or there are more layers than timesteps. The model is then as it was.
    """
    if any(isinstance(m, DenoiseLayer) for m in module.modules()):
        raise ValueError('the model has denoisers already; convert a model once, with all its targets')
    if any(map(is_lazy, module.parameters())):
        raise ValueError('the model has lazy parameters, which have no size yet; run it on an example input first')
    schedule = schedule or NoiseSchedule()
    parsed = parse_targets(targets, OPTIONS)
    excluded = [compile_pattern(text) for text in ([exclude] if isinstance(exclude, str) else exclude)]

    names = _layer_names(module)
    layers = {aliases[0]: module.get_submodule(aliases[0]) for aliases in names}
    execution = probe_execution(
        module, {n: m for n, m in layers.items() if _own_parameters(m) and 'forward' not in m.__dict__}, example_input
    )
    shared = shared_parameters(module)

    chosen, skipped = _choose(names, layers, parsed, excluded, lambda layer: _why_not(layer, execution, shared))
    if not execution.failure:
        position = {key: place for place, key in enumerate(execution.order)}
        chosen = dict(sorted(chosen.items(), key=lambda item: position[id(layers[item[0]])]))
    if len(chosen) >= len(schedule):
        raise ValueError(f'{len(chosen)} layers need as many timesteps; the schedule has {len(schedule) - 1}')
    parameters = sum(p.numel() for p in module.parameters())
    converted: list[DenoiseLayer] = []
    rows = []
    for timestep, (name, target) in zip(range(len(chosen), 0, -1), chosen.items(), strict=True):
        layer = layers[name]
        kind = type(layer).__name__
        try:
            denoised = convert_layer(layer, timestep, schedule, **{'rank': rank, 'bias': bias, **target.overrides})
        except BaseException as error:
            for done in converted:
                restore_layer(done)
            if isinstance(error, ValueError):
                raise ValueError(f'{name}: {error}') from None
            raise
        converted.append(denoised)
        extra = sum(p.numel() for p in denoised.denoiser.parameters())
        rows.append(ConvertedLayer(name, kind, tuple(denoised.weight.shape), timestep, extra))
    _refuse_merging(module)
    order = 'registration' if execution.failure else 'execution'
    return ConversionReport(tuple(rows), skipped, order, execution.failure, parameters)


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


def _refuse_merging(module: nn.Module) -> None:
    for child in module.modules():
        if not isinstance(child, DenoiseLayer) and any(isinstance(part, DenoiseLayer) for part in child.modules()):
            for name in MERGERS:
                if _takes_nothing(getattr(child, name, None)):
                    child.__dict__[name] = fuse_before_deploy


def _takes_nothing(method: Any) -> bool:
    """Whether a method works without an argument: a forward may call one of the same name that takes features."""
    try:
        return callable(method) and all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in inspect.signature(method).parameters.values()
        )
    except ValueError:  # it is not written in Python
        return False


def fuse_before_deploy(*args, **kwargs) -> None:
    """Stands in for :data:`MERGERS` of a denoised model: merging branches would drop the denoisers.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f'this model has denoisers that merging its layers ({", ".join(MERGERS)}) would drop; '
        'call fuse_model(model) first'
    )

"""Puts denoisers onto the target layers of a model, in place, and reports what was done."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils.table import format_table
from .denoiser import DEFAULT_RANK
from .layers import DenoiseLayer, convert_layer, restore_layer
from .schedule import NoiseSchedule
from .select import find_layers
from .targets import Targets

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
    schedule = schedule or NoiseSchedule()
    selection = find_layers(module, targets, exclude, example_input)
    chosen = selection.layers
    if len(chosen) >= len(schedule):
        raise ValueError(f'{len(chosen)} layers need as many timesteps; the schedule has {len(schedule) - 1}')
    parameters = sum(p.numel() for p in module.parameters())
    converted: list[DenoiseLayer] = []
    rows = []
    for timestep, (name, layer) in zip(range(len(chosen), 0, -1), chosen.items(), strict=True):
        kind = type(layer).__name__
        options = {'rank': rank, 'bias': bias, **selection.overrides[name]}
        try:
            denoised = convert_layer(layer, timestep, schedule, **options)
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
    order = 'registration' if selection.failure else 'execution'
    return ConversionReport(tuple(rows), selection.skipped, order, selection.failure, parameters)


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

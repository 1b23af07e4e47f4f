"""Gives the target layers of a model denoisers, in place."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils.table import format_table
from .denoiser import DEFAULT_RANK
from .layers import DenoiseLayer, convert_layer, find_denoise_layers, restore_layer
from .schedule import NoiseSchedule
from .select import find_layers
from .targets import Targets

REPARAMETERIZATIONS = ('switch_to_deploy', 'merge_kernel', 'local_inject', 'reparameterize', 'fuse')
"""Methods of backbones that replace branches and norms by new layers with merged weights."""


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer that got a denoiser: its vanilla class, the shape of its weight, and the parameters of the denoiser."""

    name: str
    type: str
    shape: tuple[int, ...]
    timestep: int
    extra_parameters: int


@dataclass(frozen=True)
class ConversionReport:
    """The result of :func:`apply_denoiserep`; ``print`` it for a table.

    Attributes:
        layers: The converted layers, first executed first.
        skipped: By layer name, why a layer that a target matches was not converted.
        order: ``'execution'``, or ``'registration'`` if the model did not run on the example input.
        probe_failure: Why the model did not run, or an empty string.
        parameters: Number of parameters of the model before the conversion.
    """

    layers: tuple[ConvertedLayer, ...]
    skipped: Mapping[str, str]
    order: str
    probe_failure: str
    parameters: int

    @property
    def extra_parameters(self) -> int:
        """Number of parameters that the denoisers add until they are fused."""
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

    Timesteps count down in execution order: the first of N layers gets t = N, the last one t = 1. One forward pass
    shows the order. It also finds layers that are never called, and layers whose weight another module reads
    (``nn.MultiheadAttention``, SwinV2's ``qkv``). These layers are skipped, as are layers of classes that may compute
    something else than ``nn.Linear`` or ``nn.Conv2d``, because their denoisers would not fuse exactly.

    Args:
        module: The model; it stays the same object, and every parameter keeps its name.
        targets: A preset (``'mlp'``, ``'linear'``, ``'conv2d'``, ``'all'``), a regular expression that must match the
            whole name of a module, ``dict(pattern=..., rank=..., bias=...)``, or a list of these; the first entry that
            matches a layer decides its options.
        exclude: Regular expressions for the names of layers to leave out.
        rank: Rank of the denoisers; None, or a rank of at least the channels of a group, gives full rank.
        bias: True gives every denoiser a bias, and raises where it can't be fused exactly; None gives one only where it
            can; False gives none.
        schedule: The noise schedule; None takes the default :class:`NoiseSchedule`.
        example_input: Input of the forward pass; None takes one random image, (1, 3, 224, 224).

    Returns:
        A :class:`ConversionReport`.

    Raises:
        ValueError: The module has denoisers or lazy parameters, an entry of targets or exclude is malformed or matches
            no layer that it could, an option does not fit a layer, or there are more layers than timesteps. The model
            is then unchanged.
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
    _guard_reparameterizations(module)
    order = 'registration' if selection.failure else 'execution'
    return ConversionReport(tuple(rows), selection.skipped, order, selection.failure, parameters)


def _guard_reparameterizations(module: nn.Module) -> None:
    for child in module.modules():
        if not isinstance(child, DenoiseLayer) and find_denoise_layers(child):
            for name in REPARAMETERIZATIONS:
                if _needs_no_argument(getattr(child, name, None)):
                    child.__dict__[name] = refuse_reparameterization


def _needs_no_argument(method: Any) -> bool:
    """Whether a method can be called without an argument; one that needs features may be a part of the forward."""
    try:
        return callable(method) and all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in inspect.signature(method).parameters.values()
        )
    except ValueError:  # not written in Python
        return False


def refuse_reparameterization(*args, **kwargs) -> None:
    """Replaces :data:`REPARAMETERIZATIONS` of a denoised model, which would drop the denoisers.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f'this model has denoisers that merging its layers ({", ".join(REPARAMETERIZATIONS)}) would drop; '
        'call fuse_model(model) first'
    )

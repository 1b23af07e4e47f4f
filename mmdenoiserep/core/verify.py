"""Runs a denoised and a fused model on the same input and compares what comes out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fuse import fuse_model
from .layers import DenoiseLayer, forwarding
from .probe import evaluating
from .table import format_table

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest relative difference of a whole model by the dtype of its weights: rounding, amplified by depth."""


@dataclass(frozen=True)
class Difference:
    """How far one output of the fused model is from the denoised one.

    Attributes:
        output: Name of the output, its place in what the model returns.
        max_abs: Largest absolute difference.
        max_rel: max_abs over the largest magnitude of the denoised output.
        tolerance: What max_rel may be.
    """

    output: str
    max_abs: float
    max_rel: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.max_rel <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """The differences of all outputs; ``ok`` if all of them are, ``print`` it for a table."""

    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether every output is within its tolerance."""
        return bool(self.differences) and all(difference.ok for difference in self.differences)

    def __str__(self) -> str:
        rows = [
            (d.output, f'{d.max_abs:.3e}', f'{d.max_rel:.3e}', f'{d.tolerance:.0e}', 'ok' if d.ok else 'TOO LARGE')
            for d in self.differences
        ]
        return format_table(('output', 'largest difference', 'relative', 'tolerance', ''), rows)


def verify_fusion(
    denoised: nn.Module,
    fused: nn.Module | None = None,
    example_input: Any = None,
    tolerance: float | None = None,
) -> Verification:
    """Compares a denoised model with its fused counterpart, both in eval mode; their own modes come back afterwards.

    The denoisers are applied to the features, as they are defined, and not to the weights, as a forward may do.

    Args:
        denoised: The model with denoisers.
        fused: The vanilla model to compare with; None fuses the denoised one.
        example_input: What to call both with; None takes two random images, (2, 3, 224, 224).
        tolerance: Largest relative difference; None takes :data:`TOLERANCES` for the dtype of the fused weights.

    Returns:
        A :class:`Verification`.

    Raises:
        FusionError: ``fused`` is None and the model can't be fused.
        ValueError: The models return different structures.
    """
    fused = fuse_model(denoised) if fused is None else fused
    reference = next(fused.parameters())
    if tolerance is None:
        tolerance = TOLERANCES[reference.dtype]
    if example_input is None:
        example_input = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(reference)
    layers = [layer for layer in denoised.modules() if isinstance(layer, DenoiseLayer)]
    with evaluating(denoised, fused), forwarding(layers, DenoiseLayer.forward_by_definition):
        expected = dict(_named_tensors(denoised(example_input)))
        actual = dict(_named_tensors(fused(example_input)))
    if expected.keys() != actual.keys():
        raise ValueError(f'the models return different outputs: {sorted(expected)} and {sorted(actual)}')
    return Verification(tuple(_compare(name, expected[name], actual[name], tolerance) for name in expected))


def _compare(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> Difference:
    if expected.shape != actual.shape:
        raise ValueError(f'{name} has shape {tuple(expected.shape)} denoised and {tuple(actual.shape)} fused')
    expected, actual = expected.double(), actual.double()
    max_abs = (expected - actual).abs().max().item() if expected.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return Difference(name, max_abs, max_abs / scale if scale else max_abs, tolerance)


def _named_tensors(value: Any, name: str = 'output') -> Iterator[tuple[str, Tensor]]:
    """Yields every floating-point tensor of a nested result with its place in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_tensors(item, f'{name}[{key!r}]')
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _named_tensors(item, f'{name}[{place}]')

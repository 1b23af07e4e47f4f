"""Runs a denoised and a fused model on the same input and compares what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method.layers import DenoiseLayer
from ..method.probe import evaluating, run_model
from ..utils.intercept import intercepting
from ..utils.randomness import equal_draws
from ..utils.table import format_table
from ..utils.tensors import named_tensors
from .fuse import FusionError, fuse_model

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

    @property
    def worst(self) -> str:
        """The output that is furthest apart, in words."""
        worst = max(self.differences, key=lambda difference: difference.max_rel)
        return f'{worst.output} by {worst.max_rel:.1e}, tolerance {worst.tolerance:.0e}'

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

    The denoisers are applied to the features, as they are defined, and not to the weights, as a forward may do. Both
    models see the same random numbers, for some draw them in eval mode too; the program's own stay as they were.

    Args:
        denoised: The model with denoisers.
        fused: The vanilla model to compare with; None fuses the denoised one.
        example_input: What to call both with; None takes two random images, (2, 3, 224, 224).
        tolerance: Largest relative difference; None takes :data:`TOLERANCES` for the dtype of the denoised weights.

    Returns:
        A :class:`Verification` of every floating-point tensor that the models return.

    Raises:
        FusionError: There is no denoiser, ``fused`` is None and the model can't be fused, or the models return
            different structures or no floating-point tensor.
    """
    layers = {name: layer for name, layer in denoised.named_modules() if isinstance(layer, DenoiseLayer)}
    if not layers:
        raise FusionError('there is no denoiser in the model, so there is nothing to compare')
    fused = fuse_model(denoised) if fused is None else fused
    if tolerance is None:
        tolerance = max(TOLERANCES[layer.weight.dtype] for layer in layers.values())
    if example_input is None:
        generator = torch.Generator().manual_seed(0)
        example_input = torch.randn(2, 3, 224, 224, generator=generator, device='cpu').to(next(denoised.parameters()))

    def by_definition(name: str, forward: Callable, x: Tensor) -> Tensor:
        return layers[name].forward_by_definition(x)

    with intercepting(layers, by_definition):
        return compare_models(denoised, fused, example_input, tolerance)


def compare_models(
    model: nn.Module, other: nn.Module, example_input: Any, tolerance: float | None = None
) -> Verification:
    """Compares what two models return for the same input, both in eval mode and with the same random numbers.

    Args:
        model: The model that is right.
        other: The model to compare with it.
        example_input: What to call both with.
        tolerance: Largest relative difference; None takes :data:`TOLERANCES` for the dtype of the model's weights.

    Returns:
        A :class:`Verification` of every floating-point tensor that the models return.

    Raises:
        FusionError: The models return different structures or no floating-point tensor.
    """
    if tolerance is None:
        dtypes = {p.dtype for p in model.parameters()}
        tolerance = max(value for dtype, value in TOLERANCES.items() if dtype in dtypes)
    with evaluating(model, other):
        with equal_draws(model):
            returned = run_model(model, example_input)
        with equal_draws(other):
            actual = _numbers(run_model(other, example_input))
    expected = _numbers(returned)
    if expected.keys() != actual.keys():
        raise FusionError(f'the models return different outputs: {sorted(expected)} and {sorted(actual)}')
    if not expected:
        raise FusionError(
            f'the model returns no floating-point tensor that could be compared, but a {type(returned).__name__}'
        )
    return Verification(tuple(_compare(name, expected[name], actual[name], tolerance) for name in expected))


def _compare(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> Difference:
    if expected.shape != actual.shape:
        raise FusionError(f'{name} has shape {tuple(expected.shape)} denoised and {tuple(actual.shape)} fused')
    expected, actual = _wide(expected), _wide(actual)
    apart = (expected - actual).abs().where(expected != actual, 0)  # infinities, which masks put in, may agree
    sizes = expected.abs()
    sizes = sizes[sizes.isfinite()]
    max_abs = apart.max().item() if apart.numel() else 0.0
    scale = sizes.max().item() if sizes.numel() else 0.0
    return Difference(name, max_abs, max_abs / scale if scale else max_abs, tolerance)


def _numbers(value: Any) -> dict[str, Tensor]:
    """Returns the tensors of a result that hold real or complex numbers, by their place in it."""
    return {name: x for name, x in named_tensors(value) if x.is_floating_point() or x.is_complex()}


def _wide(values: Tensor) -> Tensor:
    return values.to_dense().to(torch.complex128 if values.is_complex() else torch.float64)

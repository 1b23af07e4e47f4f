"""Compares the outputs of a denoised model and its fused counterpart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method.layers import find_denoise_layers
from ..method.probe import default_images, evaluating, run_model
from ..utils.intercept import intercepting
from ..utils.precision import without_tf32
from ..utils.randomness import equal_draws
from ..utils.table import format_table
from ..utils.tensors import named_tensors
from .fuse import FusionError, fuse_model

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest relative difference of a model's outputs, by the dtype of its weights; layers amplify rounding errors."""


@dataclass(frozen=True)
class Difference:
    """The difference between an output tensor of the denoised model and the one of the fused model.

    Attributes:
        output: Path of the tensor in what the model returns, such as ``output[0]``.
        max_abs: Largest absolute difference.
        max_rel: max_abs divided by the largest magnitude of the denoised output.
        tolerance: Largest max_rel that is accepted.
    """

    output: str
    max_abs: float
    max_rel: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether max_rel is within the tolerance; NaN is not."""
        return self.max_rel <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """The differences of all outputs; ``print`` it for a table.

    Attributes:
        differences: One for each floating-point or complex tensor that the model returns.
    """

    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether every output is within its tolerance."""
        return bool(self.differences) and all(difference.ok for difference in self.differences)

    @property
    def worst(self) -> str:
        """A description of the output with the largest relative difference."""
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
    """Compares the outputs of a denoised model and its fused counterpart, see :func:`compare_models`.

    The denoised model applies its denoisers to the features, as they are defined, also where its forward would apply
    them to the weights.

    Args:
        denoised: The model with denoisers.
        fused: The vanilla model; None fuses the denoised one.
        example_input: Input of both models; None takes two random images, (2, 3, 224, 224).
        tolerance: Largest relative difference; None takes :data:`TOLERANCES` for the dtype of the denoised weights.

    Returns:
        A :class:`Verification`.

    Raises:
        FusionError: There is no denoiser, ``fused`` is None and the model can't be fused, or the models return
            different structures or no floating-point tensor.
    """
    layers = find_denoise_layers(denoised)
    if not layers:
        raise FusionError('there is no denoiser in the model, so there is nothing to compare')
    fused = fuse_model(denoised) if fused is None else fused
    if tolerance is None:
        tolerance = max(TOLERANCES[layer.weight.dtype] for layer in layers.values())
    if example_input is None:
        example_input = default_images(denoised, 2)

    def by_definition(name: str, forward: Callable, x: Tensor) -> Tensor:
        return layers[name].forward_by_definition(x)

    with intercepting(layers, by_definition):
        return compare_models(denoised, fused, example_input, tolerance)


def compare_models(
    model: nn.Module, other: nn.Module, example_input: Any, tolerance: float | None = None
) -> Verification:
    """Compares the outputs of two models for the same input, in eval mode and with the same random numbers.

    Products of float32 are computed in float32, see :func:`~.precision.without_tf32`. The modes of the models and the
    global random state are restored afterwards.

    Args:
        model: The reference.
        other: The model to compare with the reference.
        example_input: Input of both models.
        tolerance: Largest relative difference; None takes :data:`TOLERANCES` for the dtype of the reference's weights.

    Returns:
        A :class:`Verification`.

    Raises:
        FusionError: The models return different structures or no floating-point tensor.
    """
    if tolerance is None:
        dtypes = {p.dtype for p in model.parameters()}
        tolerance = max(value for dtype, value in TOLERANCES.items() if dtype in dtypes)
    with evaluating(model, other), without_tf32():
        with equal_draws(model):
            output = run_model(model, example_input)
        with equal_draws(other):
            actual = _inexact_tensors(run_model(other, example_input))
    expected = _inexact_tensors(output)
    if expected.keys() != actual.keys():
        raise FusionError(f'the models return different outputs: {sorted(expected)} and {sorted(actual)}')
    if not expected:
        raise FusionError(
            f'the model returns no floating-point tensor that could be compared, but a {type(output).__name__}'
        )
    return Verification(tuple(_compare(name, expected[name], actual[name], tolerance) for name in expected))


def _compare(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> Difference:
    if expected.shape != actual.shape:
        raise FusionError(f'{name} has shape {tuple(expected.shape)} denoised and {tuple(actual.shape)} fused')
    expected, actual = _to_double(expected), _to_double(actual)
    difference = (expected - actual).abs().where(expected != actual, 0)  # equal infinities, of masks, differ by 0
    magnitude = expected.abs()
    magnitude = magnitude[magnitude.isfinite()]
    max_abs = difference.max().item() if difference.numel() else 0.0
    scale = magnitude.max().item() if magnitude.numel() else 0.0
    return Difference(name, max_abs, max_abs / scale if scale else max_abs, tolerance)


def _inexact_tensors(value: Any) -> dict[str, Tensor]:
    """Returns the floating-point and complex tensors of an output by their paths."""
    return {name: x for name, x in named_tensors(value) if x.is_floating_point() or x.is_complex()}


def _to_double(values: Tensor) -> Tensor:
    return values.to_dense().to(torch.complex128 if values.is_complex() else torch.float64)

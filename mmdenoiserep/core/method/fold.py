"""Folds the denoiser of one layer into its weight, in float64."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..utils.errors import InputError
from .correction import Correction

CHUNK_ELEMENTS = 2**19
"""Elements of a weight that are folded at a time: 4 MiB in float64, which fit into the cache of a CPU."""


class FusionError(InputError, ValueError):
    """A layer, model or state dict that can't be fused; the message names the key or the layer."""


@torch.no_grad()
def fold_layer(
    name: str, weight: Tensor, bias: Tensor | None, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, float]:
    """Returns ``W' = W - W B`` and ``b' = b - W b~`` of one layer.

    Computes in float64 on the CPU and rounds once, to the dtypes of W and b.

    Args:
        name: Name of the layer, for messages.
        weight: W, (O, C) or (O, C/g, kernel height, kernel width).
        bias: b, (O,), or None.
        parameters: The parameters of the layer's :class:`Denoiser` by name.

    Returns:
        W', b' and the relative change of the weight, ``|W' - W| / |W|`` (Frobenius norm).

    Raises:
        FusionError: The denoiser does not fit the layer, or a value is not finite.
    """
    try:
        correction = Correction.of(parameters)
    except ValueError as error:
        raise FusionError(f'the denoiser of {name} {error}') from None
    if correction.bias is not None and bias is None:
        raise FusionError(f'the denoiser of {name} has a bias, but the layer has none to fold it into')
    if not correction.fits(weight, bias):
        shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in parameters.items())
        raise FusionError(f'the denoiser of {name} ({shapes}) does not fit its weight {tuple(weight.shape)}')

    correction = correction.to('cpu', torch.float64)
    fused = torch.empty_like(weight)
    fused_bias = None if bias is None else torch.empty_like(bias)
    squared_change = squared_norm = 0.0
    for chunk in _chunks(weight, correction.groups):
        before = weight[chunk].to('cpu', torch.float64)
        after, chunk_bias = correction.fold(before, None if bias is None else bias[chunk].to('cpu', torch.float64))
        fused[chunk] = after
        squared_change += after.copy_(fused[chunk]).sub_(before).norm().item() ** 2  # after rounding
        squared_norm += before.norm().item() ** 2
        if fused_bias is not None and chunk_bias is not None:
            fused_bias[chunk] = chunk_bias
    if not _is_finite(fused) or (fused_bias is not None and not _is_finite(fused_bias)):
        for key, value in dict(weight=weight, bias=bias, **{f'denoiser.{k}': v for k, v in parameters.items()}).items():
            if value is not None and not _is_finite(value):
                raise FusionError(f'{name}.{key} holds NaN or Inf; fuse an earlier checkpoint')
        raise FusionError(f'the fused weight of {name} overflows {weight.dtype}; fuse in a wider dtype')
    return fused, fused_bias, (squared_change / (squared_norm or 1)) ** 0.5


def _chunks(weight: Tensor, groups: int) -> Iterator[slice]:
    """Yields ranges of outputs of at most :data:`CHUNK_ELEMENTS`; a layer with several groups is one chunk."""
    outputs = len(weight)
    step = outputs if groups > 1 else max(1, CHUNK_ELEMENTS // max(1, weight[:1].numel()))
    for start in range(0, outputs, step):
        yield slice(start, start + step)


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf: the minimum or the maximum would be one too."""
    return not values.numel() or all(torch.isfinite(extreme).item() for extreme in torch.aminmax(values))

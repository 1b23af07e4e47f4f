"""Folds a correction into the weight of its layer: computed in float64, cast once to the dtype of the weight."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..utils.errors import InputError
from .correction import Correction

PART = 2**19
"""Elements of a weight that are folded at a time: 4 MiB in float64, which the cache may hold."""


class FusionError(InputError, ValueError):
    """A layer or a state dict that can't be fused; the message names the key or the layer."""


def fold_layer(
    name: str, weight: Tensor, bias: Tensor | None, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, float]:
    """Returns ``W' = W - W B`` and ``b' = b - W b~`` of one layer, on the CPU's float64, in the dtypes of W and b.

    Args:
        name: Name of the layer, for messages.
        weight: W, (O, C) or (O, C/g, kernel height, kernel width).
        bias: b, (O,), or None.
        parameters: Those of its :class:`Denoiser` by name.

    Returns:
        W', b' and the relative change of the weight, ``|W' - W| / |W|`` (Frobenius norm).

    Raises:
        FusionError: The denoiser does not belong to the layer, or a value is not finite.
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

    wide = Correction.of({key: _wide(value) for key, value in parameters.items()})
    folded = torch.empty_like(weight)
    shifted = None if bias is None else torch.empty_like(bias)
    change = size = 0.0
    for part in _parts(weight, wide.groups):
        before = _wide(weight[part])
        after, b = wide.fold(before, None if bias is None else _wide(bias[part]))
        folded[part] = after
        change += after.copy_(folded[part]).sub_(before).norm().item() ** 2
        size += before.norm().item() ** 2
        if shifted is not None and b is not None:
            shifted[part] = b
    if not _is_finite(folded) or (shifted is not None and not _is_finite(shifted)):
        for key, value in dict(weight=weight, bias=bias, **{f'denoiser.{k}': v for k, v in parameters.items()}).items():
            if value is not None and not _is_finite(value):
                raise FusionError(f'{name}.{key} holds NaN or Inf; fuse an earlier checkpoint')
        raise FusionError(f'the fused weight of {name} overflows {weight.dtype}; fuse in a wider dtype')
    return folded, shifted, (change / (size or 1)) ** 0.5


def _parts(weight: Tensor, groups: int) -> Iterator[slice]:
    """Yields ranges of outputs that are small enough to be folded in the cache; groups stay together."""
    outputs = len(weight)
    step = outputs if groups > 1 else max(1, PART // max(1, weight[:1].numel()))
    for start in range(0, outputs, step):
        yield slice(start, start + step)


def _wide(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf; either would show in the extremes."""
    return not values.numel() or all(torch.isfinite(extreme).item() for extreme in torch.aminmax(values))

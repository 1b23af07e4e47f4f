"""Affine maps of a layer's features: applied step by step, and folded into the weights of the layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.layers import Layer
from ..utils.intercept import intercepting
from .features import fitted_on_output


def apply_map(layer: Layer, x: Tensor, linear: Tensor, constant: Tensor) -> Tensor:
    """Returns ``A x + c`` of what a layer takes (Linear) or gives (convolution), in the same layout.

    Args:
        layer: The layer.
        x: (..., C), or (B, C, H, W) of a convolution.
        linear: A, (groups, size, size).
        constant: c, (groups, size).
    """
    if isinstance(layer, nn.Conv2d):
        kernel = linear.flatten(0, 1)[..., None, None].to(x)  # (C, C/g, 1, 1)
        return F.conv2d(x, kernel, constant.flatten().to(x), groups=linear.shape[0])
    return F.linear(x, linear[0].to(x), constant[0].to(x))


@contextmanager
def explicit_maps(module: nn.Module, maps: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Makes layers take or give ``A x + c`` while it lasts, step by step: what a domain fit folds into the weights.

    Args:
        module: A model before the fit.
        maps: A and c by layer name.
    """
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in maps}

    def run(name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        x, *rest = (*args, *keywords.values())
        if fitted_on_output(layers[name]):
            return apply_map(layers[name], forward(x, *rest), *maps[name])
        return forward(apply_map(layers[name], x, *maps[name]), *rest)

    with intercepting(layers, run):
        yield


@torch.no_grad()
def fold_map(layer: Layer, norm: Tensor | None, linear: Tensor, constant: Tensor) -> None:
    """Folds a map into a layer, in place, in float64.

        Linear, on its input:        ``W' = W A``,   ``b' = b + W c``
        convolution, on its output:  ``W' = A W``,   ``b' = A b + c``

    Without a bias, the norm takes what belongs to c: ``A^-1 c`` is added to the bias of the LayerNorm before a Linear
    layer; c is subtracted from the running mean of the BatchNorm behind a convolution.

    Args:
        layer: The layer.
        norm: What takes the constant where the layer has no bias; None for a constant of zero.
        linear: A, (groups, size, size).
        constant: c, (groups, size).
    """
    weight, linear = layer.weight.double(), linear.double()
    bias: Tensor | None = layer.bias
    if fitted_on_output(layer):
        rows = weight.reshape(*linear.shape[:2], -1)  # (groups, C_out/g, C_in/g * kh * kw)
        layer.weight.copy_((linear @ rows).reshape(weight.shape))
        if bias is not None:
            bias.copy_((linear @ bias.double().reshape(*linear.shape[:2], 1)).flatten() + constant.flatten())
        elif norm is not None:
            norm.sub_(constant.flatten())
    else:
        if bias is not None:
            bias.add_(weight @ constant[0])  # before the weight, which in float64 is no copy
        elif norm is not None:
            norm.add_(before_map(linear, constant)[0])
        layer.weight.copy_(weight @ linear[0])


def before_map(linear: Tensor, constant: Tensor) -> Tensor:
    """Returns ``A^-1 c``, (groups, size): the shift of x that makes ``A x`` into ``A x + c``."""
    return torch.linalg.solve(linear.double(), constant[..., None])[..., 0]

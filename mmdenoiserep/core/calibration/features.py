"""Gathers the moments of what a domain fit corrects: the input of a Linear layer, the output of a convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.layers import DenoiseLayer, Layer, input_channels
from ..method.sample import Sample
from .moments import Moments


def fitted_on_output(layer: Layer) -> bool:
    """Whether a domain fit corrects what the layer returns: a convolution, whose padding a constant would miss."""
    return isinstance(layer, nn.Conv2d)


class Features:
    """What is gathered of a layer: the vectors that a domain fit corrects, or those of the layer's input.

    The output of a convolution is computed at the chosen pixels alone. That of a 1x1 convolution with no more inputs
    than outputs, ``y = W x + b``, is not computed at all: its moments follow from those of the input,

        ``E[y] = W mu + b``,   ``Cov[y] = W S W^T``

    Args:
        layer: The layer.
        inputs: Takes the input, also of a convolution.
    """

    def __init__(self, layer: Layer, inputs: bool = False) -> None:
        self.layer = layer
        self.channels, self.groups = input_channels(layer)  # type: ignore[arg-type]
        self.on_output = fitted_on_output(layer) and not inputs
        self.follows = self.on_output and _is_narrow(layer) and not isinstance(layer, DenoiseLayer)
        if self.on_output and not self.follows:
            self.channels = layer.weight.shape[0]
        self.channels //= self.groups

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and channels of what a fit corrects in each."""
        return self.groups, self.layer.weight.shape[0] if self.follows else self.channels

    def empty(self) -> Moments:
        """Returns moments of no vectors."""
        return Moments(self.groups, self.channels, self.layer.weight.device)

    def vectors(self, sample: Sample, x: Tensor, stride: int, output: Tensor | None = None) -> Tensor:
        """Returns one in ``stride`` of the vectors of a batch, image after image, (groups, channels, n).

        Args:
            sample: Chooses them.
            x: What the layer is called with.
            stride: 1 takes all.
            output: What it returns, if that is known.
        """
        layer = self.layer
        if not self.on_output:
            return sample(layer, x, stride)
        if output is not None and not self.follows:
            return sample(layer, output, stride)
        assert isinstance(layer, nn.Conv2d)
        images = x if x.dim() == 4 else x[None]
        height, width = _output_size(layer, images)
        places = sample.draw(len(images), height * width, stride)
        if self.follows:
            pixels = images[..., :: layer.stride[0], :: layer.stride[1]].flatten(2)  # (B, C, H' * W')
            if places is not None:
                pixels = pixels.gather(2, places[:, None].to(x.device).expand(-1, pixels.shape[1], -1))
            return pixels.permute(1, 0, 2).flatten(1)[None]  # (1, C, B * n)
        if places is None:
            outputs = nn.Conv2d._conv_forward(layer, images, layer.weight, layer.bias).flatten(2)  # (B, C_out, H' * W')
        else:
            outputs = convolve_at(layer, images, places.to(x.device))  # (B, C_out, n)
        return outputs.unflatten(1, (self.groups, -1)).permute(1, 2, 0, 3).flatten(2)

    def moments(self, gathered: Moments) -> Moments:
        """Returns the moments of what a fit corrects, from those of the vectors."""
        return gathered.mapped(self.layer.weight.flatten(1), self.layer.bias) if self.follows else gathered


def convolve_at(layer: nn.Conv2d, x: Tensor, places: Tensor) -> Tensor:
    """Returns the output of a convolution at some pixels, (B, C_out, n).

    Args:
        layer: The convolution.
        x: (B, C, H, W).
        places: Which pixels of the output, counted row by row, (B, n).
    """
    _, width = _output_size(layer, x)
    left, _, top, _ = padding = _padding(layer)
    zeros = layer.padding_mode == 'zeros'  # then no padded copy is made
    if not zeros:
        x = F.pad(x, padding, layer.padding_mode)
        left = top = 0
    taps = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in layer.kernel_size))  # (k, 2)
    rows, columns = taps.view(-1, 2).mul(torch.tensor(layer.dilation, device=x.device)).mT[..., None, None]  # (k, 1, 1)
    rows = rows + places.div(width, rounding_mode='floor') * layer.stride[0] - top  # (k, B, n)
    columns = columns + places % width * layer.stride[1] - left
    inside = (rows >= 0) & (rows < x.shape[-2]) & (columns >= 0) & (columns < x.shape[-1])
    index = (rows * x.shape[-1] + columns).where(inside, 0).transpose(0, 1).flatten(1)  # (B, k * n)
    patches = x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))  # (B, C, k * n)
    if zeros and any(padding):
        patches *= inside.transpose(0, 1).flatten(1)[:, None]
    patches = patches.reshape(len(x), layer.groups, -1, places.shape[1])  # (B, g, C/g * k, n)
    weight = layer.weight.reshape(layer.groups, -1, patches.shape[2])  # (g, C_out/g, C/g * k)
    output = (weight @ patches).flatten(1, 2)
    return output if layer.bias is None else output + layer.bias[:, None]


def _is_narrow(layer: Layer) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.groups == 1
        and layer.in_channels <= layer.out_channels
        and not any(_padding(layer))
    )


def _padding(layer: nn.Conv2d) -> list[int]:
    """Returns what is added on each side: (left, right, top, bottom)."""
    if isinstance(layer.padding, str) or layer.padding_mode != 'zeros':
        return list(layer._reversed_padding_repeated_twice)
    height, width = layer.padding  # what the forward reads, and models may change it
    return [width, width, height, height]


def _output_size(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    left, right, top, bottom = _padding(layer)
    sizes = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    height, width = (
        (size - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1) // layer.stride[i] + 1
        for i, size in enumerate(sizes)
    )
    return height, width

"""The correction of one layer: ``x' = x - (B x + b~)``, at full and at low rank, with its loss and its fold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.tensors import join
from .schedule import ReverseStep


@dataclass(frozen=True, eq=False)
class Correction:
    """``B x + b~`` with ``b~ = bias`` and a block-diagonal B, one block for each group of channels.

        full rank:  ``B = weight``
        low rank:   ``B = scale I + up down``

    Only this class distinguishes the two forms.
    """

    weight: Tensor | None = None  # (groups, C/g, C/g)
    scale: Tensor | None = None  # (groups,)
    up: Tensor | None = None  # (groups, C/g, rank)
    down: Tensor | None = None  # (groups, rank, C/g)
    bias: Tensor | None = None  # (C,)

    @staticmethod
    def of(parameters: Mapping[str, Tensor]) -> 'Correction':
        """Returns the correction with the parameters of a :class:`Denoiser`, given by name.

        Raises:
            ValueError: The names fit neither form.
        """
        if parameters.keys() - {'bias'} not in ({'weight'}, {'scale', 'up', 'down'}):
            raise ValueError(f'is incomplete: it has only {", ".join(sorted(parameters))}')
        return Correction(**parameters)

    @staticmethod
    def stacked(corrections: Sequence['Correction']) -> 'Correction':
        """Returns the blocks of several corrections of the same shapes, one after the other, as one correction."""
        names = corrections[0].tensors
        return Correction(**{name: join([getattr(one, name) for one in corrections]) for name in names})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def rank(self) -> int | None:
        """Rank of ``up down``; None at full rank."""
        return None if self.up is None else self.up.shape[-1]

    def to(self, *args: Any, **kwargs: Any) -> 'Correction':
        """Applies ``Tensor.to`` to every tensor."""
        return Correction(**{name: value.to(*args, **kwargs) for name, value in self.tensors.items()})

    def matrix(self) -> Tensor:
        """Returns B, (groups, C/g, C/g), differentiable."""
        if self.weight is not None:
            return self.weight
        scale, up, down = self._factors
        low_rank = up @ down  # (groups, C/g, C/g)
        identity = torch.eye(low_rank.shape[-1], device=low_rank.device, dtype=low_rank.dtype)
        return scale[:, None, None] * identity + low_rank

    def apply(self, x: Tensor, project: Callable[..., Tensor], channel_shape: tuple[int, ...]) -> Tensor:
        """Returns ``B x + b~`` in the layout of a layer's features.

        Args:
            x: Features.
            project: ``project(x, matrix, bias)`` applies a block-diagonal matrix, (groups, out/g, in/g), and a bias to
                the channels of x.
            channel_shape: Shape in which one number for each channel, (C,), multiplies x.
        """
        if self.weight is not None:
            return project(x, self.weight, self.bias)
        scale, up, down = self._factors
        low_rank = project(project(x, down, None), up, self.bias)
        return x * scale.repeat_interleave(up.shape[1]).reshape(channel_shape) + low_rank  # (groups,) -> (C,)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns ``W' = W - W B`` and ``b' = b - W b~``, differentiable, in the dtype of the arguments.

        Args:
            weight: W of a Linear layer, (O, C), or of a convolution, (O, C/g, kernel height, kernel width).
            bias: b, (O,), or None.
        """
        columns = self._left_factor
        groups, size, count = columns.shape
        if self.bias is not None:
            columns = torch.cat([columns, self.bias.reshape(groups, size, 1)], 2)  # (groups, C/g, count + 1)
        taps = weight.reshape(groups, weight.shape[0] // groups, size, -1).mT  # (groups, O/g, taps, C/g)
        rows = taps.reshape(groups, -1, size)  # (groups, O/g * taps, C/g)
        products = rows @ columns  # W B or W up, and in the last column W b~, (groups, O/g * taps, count + 1)
        if self.weight is not None:
            folded = rows - products[..., :count]
        else:
            scale, _, down = self._factors
            folded = rows * (1 - scale[:, None, None])
            folded.baddbmm_(products[..., :count], down, alpha=-1)
        if self.bias is not None and bias is not None:
            bias = bias - products[..., count].reshape(len(bias), -1).sum(1)  # (O, taps) -> (O,)
        folded = folded.reshape(taps.shape).mT.reshape(len(weight), -1)  # (O, C/g * taps), a copy with several taps
        return folded.reshape(weight.shape), bias

    def losses(self, vectors: Tensor, step: ReverseStep) -> Tensor:
        """Returns the expected squared error of the predicted noise for each block, per channel, averaged over n.

            ``L = E_eps |eps - (D x_t + d)|^2 / C,   x_t = sqrt(abar) x + sqrt(1 - abar) eps``
            ``  = ( |sqrt(abar) D x + d|^2 + |I - sqrt(1 - abar) D|_F^2 ) / C``

        with ``D = (B + (c3 - 1) I) / c1``, ``d = b~ / c1`` and C channels of a block. The expectation over the noise
        eps is exact: no noise is sampled. At low rank, ``|a I - U V|_F^2 = a^2 C - 2 a tr(U V) + sum(U^T U * V V^T)``
        needs no C x C matrix.

        Args:
            vectors: Features x, (groups, C/g, n), in the dtype of the correction.
            step: The constants of the timestep; tensors, (groups,), for blocks of several layers.

        Returns:
            (groups,), whose mean is the loss of a layer; 0 for n = 0.
        """
        if vectors.numel() == 0:
            nothing = torch.stack([value.sum() * 0 for value in self.tensors.values()]).sum()
            return nothing.expand(self.groups)
        groups, size, _ = vectors.shape
        signal, noise, c1, shift = (value.reshape(-1, 1, 1) for value in constants_of(step, vectors))
        x = vectors * signal
        ratio = noise / c1  # (groups or 1, 1, 1)
        if self.weight is not None:
            identity = torch.eye(size, device=x.device, dtype=x.dtype)
            correction = self.weight @ x
            residual = (identity - ratio * (self.weight + shift * identity)).square().sum((1, 2))
        else:
            scale, up, down = self._factors
            correction = torch.baddbmm(x * scale[:, None, None], up, down @ x)  # B x, (groups, C/g, n)
            ratio = ratio.flatten()
            rest = 1 - ratio * (scale + shift.flatten())  # a, (groups,)
            trace = ratio * (up * down.mT).sum((1, 2))  # tr(U V), (groups,)
            square = ratio**2 * ((up.mT @ up) * (down @ down.mT)).sum((1, 2))  # |U V|_F^2, (groups,)
            residual = rest.square() * size - 2 * rest * trace + square
        if self.bias is not None:
            correction = correction + self.bias.reshape(groups, size, 1)
        prediction = torch.addcmul(correction, x, shift) / c1  # sqrt(abar) D x + d
        return prediction.square().mean((1, 2)) + residual / size

    @torch.no_grad()
    def curvatures(self, vectors: Tensor, step: ReverseStep) -> Tensor:
        """Returns an upper bound of the curvature of each block of :meth:`losses` in the parameters.

            full rank:  ``2 / (C c1^2) * (q + 1)``
            low rank:   ``2 / (C c1^2) * (q (1 + |up|^2 + |down|^2) + 1)``,   ``q = abar E|x|^2 + (1 - abar) C``

        It bounds the Gauss-Newton matrix ``2 J^T J`` of the loss ``|r|^2``, where J is the derivative of r. The trace q
        of the second moment of the noised features bounds the largest eigenvalue of that moment. The summand 1 comes
        from the bias, and is 0 without one.

        Args:
            vectors: Features x, (groups, C/g, n), in the dtype of the correction.
            step: The constants of the timestep; tensors, (groups,), for blocks of several layers.

        Returns:
            (groups,); 0 for n = 0. The loss of a layer, the mean of g blocks, has 1/g of the largest one.
        """
        groups, size, _ = vectors.shape
        if vectors.numel() == 0:
            return vectors.new_zeros(groups)
        signal, noise, c1, _ = constants_of(step, vectors)
        trace = signal**2 * vectors.square().sum(1).mean(1) + noise**2 * size  # q, (groups,)
        if self.weight is None:
            trace = trace * (1 + sum(factor.square().sum((1, 2)) for factor in self._factors[1:]))
        return 2 / (size * c1**2) * (trace + (self.bias is not None))

    def fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the shapes fit each other and a layer with this weight and bias; a Linear layer has one group."""
        if self._left_factor.dim() != 3 or not len(self._left_factor) or weight.dim() not in (2, 4):
            return False
        groups, size, rank = self._left_factor.shape
        shapes = dict(weight=(groups, size, size), scale=(groups,), up=(groups, size, rank), down=(groups, rank, size))
        shapes['bias'] = (groups * size,)
        return (
            size == weight.shape[1]
            and weight.shape[0] % groups == 0
            and (weight.dim() == 4 or groups == 1)
            and (bias is None or bias.shape == weight.shape[:1])
            and all(value.shape == shapes[name] for name, value in self.tensors.items())
        )

    @property
    def groups(self) -> int:
        """Number of blocks of B."""
        return len(self._left_factor)

    @property
    def _left_factor(self) -> Tensor:
        """``weight`` or ``up``, (groups, C/g, C/g or rank)."""
        return self._factors[1] if self.weight is None else self.weight

    @property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``scale``, ``up`` and ``down`` of the low-rank form."""
        assert self.scale is not None and self.up is not None and self.down is not None
        return self.scale, self.up, self.down


def constants_of(step: ReverseStep, like: Tensor) -> list[Tensor]:
    """Returns the constants of a timestep in the dtype of a tensor, on its device."""
    return [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in step]

"""The correction of one layer: ``x' = x - (B x + b~)``, at full and at low rank, with its loss and its fold."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .schedule import ReverseStep


@dataclass(frozen=True, eq=False, kw_only=True)
class Correction(ABC):
    """``B x + b~``, with B block-diagonal: one block for each group of channels.

    Attributes:
        bias: b~, shape (C,), or None.
    """

    bias: Tensor | None = None

    @staticmethod
    def of(parameters: Mapping[str, Tensor]) -> 'Correction':
        """Returns the correction that the parameters of a :class:`Denoiser` describe.

        Args:
            parameters: Tensors by name: ``weight``, or ``scale``, ``up`` and ``down``; perhaps ``bias``.

        Raises:
            ValueError: The names are not these.
        """
        for kind in (FullRank, LowRank):
            if parameters.keys() - {'bias'} == {field.name for field in fields(kind)} - {'bias'}:
                return kind(**parameters)
        raise ValueError(f'is incomplete: it has only {", ".join(sorted(parameters))}')

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, *args: Any, **kwargs: Any) -> 'Correction':
        """Returns the same correction in another dtype or on another device, as ``Tensor.to``."""
        return replace(self, **{name: value.to(*args, **kwargs) for name, value in self.tensors.items()})

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """Rank of the low-rank part; None at full rank."""

    @property
    @abstractmethod
    def columns(self) -> Tensor:
        """What the weight of the layer is multiplied by in a fold, (groups, C/g, any)."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Returns B, (groups, C/g, C/g), differentiable."""

    @abstractmethod
    def apply(self, x: Tensor, project: Callable[..., Tensor], scale: Callable[..., Tensor]) -> Tensor:
        """Returns ``B x + b~`` for features in the layout of a layer.

        Args:
            x: Features.
            project: ``project(x, matrix, bias)`` applies (groups, out/g, in/g) and a bias to the channels of x.
            scale: ``scale(x, factors)`` multiplies the channels of each group by a number, (groups,).
        """

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns ``W' = W - W B`` and ``b' = b - W b~``, differentiable, in the dtype of what it is given.

        Args:
            weight: W of a Linear layer, (O, C), or of a convolution, (O, C/g, kernel height, kernel width).
            bias: b, (O,), or None.
        """
        groups, size, count = self.columns.shape
        columns = self.columns
        if self.bias is not None:
            columns = torch.cat([columns, self.bias.reshape(groups, size, 1)], 2)
        taps = weight.reshape(groups, weight.shape[0] // groups, size, -1).mT  # (groups, O/g, taps, C/g)
        rows = taps.reshape(groups, -1, size)  # (groups, O/g * taps, C/g)
        # W B or W up, and W b~, of all rows: (groups, count + 1, rows); in float64 twice as fast as rows @ columns
        products = columns.mT @ rows.mT
        folded = self._subtract(rows, products[:, :count].mT)
        if self.bias is not None and bias is not None:
            bias = bias - products[:, count].reshape(len(bias), -1).sum(1)  # (O, taps) -> (O,)
        folded = folded.reshape(taps.shape).mT.reshape(len(weight), -1)  # (O, C/g * taps), a copy with several taps
        return folded.reshape(weight.shape), bias

    @abstractmethod
    def _subtract(self, rows: Tensor, products: Tensor) -> Tensor:
        """Returns ``rows - rows B``, (groups, n, C/g), given ``rows @ columns``."""

    def loss(self, vectors: Tensor, step: ReverseStep) -> Tensor:
        """Returns the error of predicting the noise in features, with the noise integrated out.

            ``L = E_eps |eps - (D x_t + d)|^2 / C,   x_t = sqrt(abar) x + sqrt(1 - abar) eps``
            ``  = ( |sqrt(abar) D x + d|^2 + |I - sqrt(1 - abar) D|_F^2 ) / C``, averaged over the vectors x

        with ``D = (B + (c3 - 1) I) / c1`` and ``d = b~ / c1``: no sampling of noise, so no variance.

        Args:
            vectors: Features x, (groups, C/g, n), in the dtype of the correction. Without any the loss is 0.
            step: The constants of the layer's timestep.

        Returns:
            A scalar.
        """
        if vectors.numel() == 0:
            return torch.stack([value.sum() * 0 for value in self.tensors.values()]).sum()
        groups, size, _ = vectors.shape
        x = vectors * step.signal
        correction = self._product(x)
        if self.bias is not None:
            correction = correction + self.bias.reshape(groups, size, 1)
        prediction = torch.add(correction, x, alpha=step.c3_minus_1) / step.c1
        return prediction.square().mean() + self._residual(step) / (groups * size)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """Returns B x for vectors, (groups, C/g, n)."""

    @abstractmethod
    def _residual(self, step: ReverseStep) -> Tensor:
        """Returns ``|I - sqrt(1 - abar) D|_F^2``, a scalar."""

    @torch.no_grad()
    def curvature(self, vectors: Tensor, step: ReverseStep) -> Tensor:
        """Returns a bound of the largest curvature of :meth:`loss` in the parameters.

        The loss is a sum of squares ``|r|^2``, so its curvature near the minimum is that of ``2 J^T J``, with J the
        derivative of r. Per group,

            full:      ``2 / (C c1^2) * (q + 1)``
            low rank:  ``2 / (C c1^2) * (q (1 + |up|^2 + |down|^2) + 1)``,   ``q = abar E|x|^2 + (1 - abar) C/g``

        where q is the trace of the second moment of the noised features, which bounds its largest eigenvalue, and the
        1 is the bias, if there is one. The largest over the groups counts.

        Args:
            vectors: Features x, (groups, C/g, n), in the dtype of the correction.
            step: The constants of the layer's timestep.

        Returns:
            A scalar, 0 without vectors.
        """
        if vectors.numel() == 0:
            return vectors.new_zeros(())
        groups, size, _ = vectors.shape
        trace = step.signal**2 * vectors.square().sum(1).mean(1) + step.noise**2 * size  # q, (groups,)
        steepest = self._steepness(trace).amax() + (self.bias is not None)
        return 2 / (groups * size * step.c1**2) * steepest

    @abstractmethod
    def _steepness(self, trace: Tensor) -> Tensor:
        """Returns the bound of a group without its factor and bias, (groups,), from q, (groups,)."""

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that the tensors have to have, by name."""

    def fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the shapes are those of a correction for this layer; a Linear layer has one group."""
        if self.columns.dim() != 3 or not len(self.columns) or weight.dim() not in (2, 4):
            return False
        groups, size, _ = self.columns.shape
        shapes = {**self._shapes(), 'bias': (groups * size,)}
        return (
            size == weight.shape[1]
            and weight.shape[0] % groups == 0
            and (weight.dim() == 4 or groups == 1)
            and (bias is None or bias.shape == weight.shape[:1])
            and all(value.shape == shapes[name] for name, value in self.tensors.items())
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class FullRank(Correction):
    """``B = weight``.

    Attributes:
        weight: (groups, C/g, C/g).
    """

    weight: Tensor

    @property
    def rank(self) -> None:
        """None."""
        return None

    @property
    def columns(self) -> Tensor:
        """B, (groups, C/g, C/g)."""
        return self.weight

    def matrix(self) -> Tensor:
        """Returns B, (groups, C/g, C/g)."""
        return self.weight

    def apply(self, x: Tensor, project: Callable[..., Tensor], scale: Callable[..., Tensor]) -> Tensor:
        """Returns ``B x + b~``, see :meth:`Correction.apply`."""
        return project(x, self.weight, self.bias)

    def _subtract(self, rows: Tensor, products: Tensor) -> Tensor:
        return rows - products

    def _product(self, x: Tensor) -> Tensor:
        return self.weight @ x

    def _residual(self, step: ReverseStep) -> Tensor:
        noise = step.noise / step.c1
        identity = torch.eye(self.weight.shape[-1], device=self.weight.device, dtype=self.weight.dtype)
        return (identity - noise * (self.weight + step.c3_minus_1 * identity)).square().sum()

    def _steepness(self, trace: Tensor) -> Tensor:
        return trace

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        groups, size, _ = self.weight.shape
        return dict(weight=(groups, size, size))


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Correction):
    """``B = scale I + up down``.

    Attributes:
        scale: (groups,).
        up: (groups, C/g, rank).
        down: (groups, rank, C/g).
    """

    scale: Tensor
    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Rank of ``up down``."""
        return self.up.shape[-1]

    @property
    def columns(self) -> Tensor:
        """``up``, (groups, C/g, rank)."""
        return self.up

    def matrix(self) -> Tensor:
        """Returns B, (groups, C/g, C/g)."""
        low_rank = self.up @ self.down
        identity = torch.eye(low_rank.shape[-1], device=low_rank.device, dtype=low_rank.dtype)
        return self.scale[:, None, None] * identity + low_rank

    def apply(self, x: Tensor, project: Callable[..., Tensor], scale: Callable[..., Tensor]) -> Tensor:
        """Returns ``B x + b~``, see :meth:`Correction.apply`."""
        return scale(x, self.scale) + project(project(x, self.down, None), self.up, self.bias)

    def _subtract(self, rows: Tensor, products: Tensor) -> Tensor:
        folded = rows * (1 - self.scale[:, None, None])
        return folded.baddbmm_(products, self.down, alpha=-1)

    def _product(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x * self.scale[:, None, None], self.up, self.down @ x)

    def _residual(self, step: ReverseStep) -> Tensor:
        """Builds no C x C matrix: ``|a I - U V|_F^2 = a^2 C - 2 a tr(U V) + sum(U^T U * V V^T)``."""
        noise, size = step.noise / step.c1, self.up.shape[1]
        rest = 1 - noise * (self.scale + step.c3_minus_1)
        trace = noise * (self.up * self.down.mT).sum((1, 2))
        square = noise**2 * ((self.up.mT @ self.up) * (self.down @ self.down.mT)).sum((1, 2))
        return (rest.square() * size - 2 * rest * trace + square).sum()

    def _steepness(self, trace: Tensor) -> Tensor:
        return trace * (1 + sum(factor.square().sum((1, 2)) for factor in (self.up, self.down)))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        groups, size, rank = self.up.shape
        return dict(scale=(groups,), up=(groups, size, rank), down=(groups, rank, size))

"""The correction of one layer: ``x' = x - (B x + b~)``, at full and at low rank, with its loss and its fold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .schedule import ReverseStep


@dataclass(frozen=True, eq=False)
class Correction:
    """``B x + b~``, with B block-diagonal: one block for each group of channels.

    Full:     ``B = weight``             weight (groups, C/g, C/g)
    Low rank: ``B = scale I + up down``  scale (groups,), up (groups, C/g, rank), down (groups, rank, C/g)

    and b~ is ``bias`` (C,), or None. This class alone tells the two apart.
    """

    weight: Tensor | None = None
    scale: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(parameters: Mapping[str, Tensor]) -> 'Correction':
        """Returns the correction that the parameters of a :class:`Denoiser` describe, by their names.

        Raises:
            ValueError: They are not those of a full or of a low-rank one.
        """
        if parameters.keys() - {'bias'} not in ({'weight'}, {'scale', 'up', 'down'}):
            raise ValueError(f'is incomplete: it has only {", ".join(sorted(parameters))}')
        return Correction(**parameters)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def rank(self) -> int | None:
        """Rank of ``up down``; None at full rank."""
        return None if self.up is None else self.up.shape[-1]

    def to(self, *args: Any, **kwargs: Any) -> 'Correction':
        """Returns the same correction in another dtype or on another device, as ``Tensor.to``."""
        return Correction(**{name: value.to(*args, **kwargs) for name, value in self.tensors.items()})

    def matrix(self) -> Tensor:
        """Returns B, (groups, C/g, C/g), differentiable."""
        if self.weight is not None:
            return self.weight
        scale, up, down = self._low_rank
        low_rank = up @ down
        identity = torch.eye(low_rank.shape[-1], device=low_rank.device, dtype=low_rank.dtype)
        return scale[:, None, None] * identity + low_rank

    def apply(self, x: Tensor, project: Callable[..., Tensor], scale: Callable[..., Tensor]) -> Tensor:
        """Returns ``B x + b~`` for features in the layout of a layer.

        Args:
            x: Features.
            project: ``project(x, matrix, bias)`` applies (groups, out/g, in/g) and a bias to the channels of x.
            scale: ``scale(x, factors)`` multiplies the channels of each group by a number, (groups,).
        """
        if self.weight is not None:
            return project(x, self.weight, self.bias)
        factors, up, down = self._low_rank
        low_rank = project(project(x, down, None), up, self.bias)
        return scale(x, factors) + low_rank

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns ``W' = W - W B`` and ``b' = b - W b~``, differentiable, in the dtype of what it is given.

        Args:
            weight: W of a Linear layer, (O, C), or of a convolution, (O, C/g, kernel height, kernel width).
            bias: b, (O,), or None.
        """
        columns = self._columns
        groups, size, count = columns.shape
        if self.bias is not None:
            columns = torch.cat([columns, self.bias.reshape(groups, size, 1)], 2)
        taps = weight.reshape(groups, weight.shape[0] // groups, size, -1).mT  # (groups, O/g, taps, C/g)
        rows = taps.reshape(groups, -1, size)  # (groups, O/g * taps, C/g)
        # W B or W up, and W b~, of all rows: (groups, count + 1, rows); in float64 twice as fast as rows @ columns
        products = columns.mT @ rows.mT
        if self.weight is not None:
            folded = rows - products[:, :count].mT
        else:
            scale, _, down = self._low_rank
            folded = rows * (1 - scale[:, None, None])
            folded.baddbmm_(products[:, :count].mT, down, alpha=-1)
        if self.bias is not None and bias is not None:
            bias = bias - products[:, count].reshape(len(bias), -1).sum(1)  # (O, taps) -> (O,)
        folded = folded.reshape(taps.shape).mT.reshape(len(weight), -1)  # (O, C/g * taps), a copy with several taps
        return folded.reshape(weight.shape), bias

    def loss(self, vectors: Tensor, step: ReverseStep) -> Tensor:
        """Returns the error of predicting the noise in features, with the noise integrated out.

            ``L = E_eps |eps - (D x_t + d)|^2 / C,   x_t = sqrt(abar) x + sqrt(1 - abar) eps``
            ``  = ( |sqrt(abar) D x + d|^2 + |I - sqrt(1 - abar) D|_F^2 ) / C``, averaged over the vectors x

        with ``D = (B + (c3 - 1) I) / c1`` and ``d = b~ / c1``: no sampling of noise, so no variance. No C x C matrix is
        built at low rank: ``|a I - U V|_F^2 = a^2 C - 2 a tr(U V) + sum(U^T U * V V^T)``.

        Args:
            vectors: Features x, (groups, C/g, n), in the dtype of the correction. Without any the loss is 0.
            step: The constants of the layer's timestep.

        Returns:
            A scalar.
        """
        if vectors.numel() == 0:
            return torch.stack([value.sum() * 0 for value in self.tensors.values()]).sum()
        groups, size, _ = vectors.shape
        noise = step.noise / step.c1
        x = vectors * step.signal
        if self.weight is not None:
            identity = torch.eye(size, device=x.device, dtype=x.dtype)
            correction = self.weight @ x
            residual = (identity - noise * (self.weight + step.c3_minus_1 * identity)).square().sum()
        else:
            scale, up, down = self._low_rank
            correction = torch.baddbmm(x * scale[:, None, None], up, down @ x)
            rest = 1 - noise * (scale + step.c3_minus_1)
            trace = noise * (up * down.mT).sum((1, 2))
            square = noise**2 * ((up.mT @ up) * (down @ down.mT)).sum((1, 2))
            residual = (rest.square() * size - 2 * rest * trace + square).sum()
        if self.bias is not None:
            correction = correction + self.bias.reshape(groups, size, 1)
        prediction = torch.add(correction, x, alpha=step.c3_minus_1) / step.c1
        return prediction.square().mean() + residual / (groups * size)

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
        if self.weight is None:
            trace = trace * (1 + sum(factor.square().sum((1, 2)) for factor in self._low_rank[1:]))
        return 2 / (groups * size * step.c1**2) * (trace.amax() + (self.bias is not None))

    def fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the shapes are those of a correction for this layer; a Linear layer has one group."""
        if self._columns.dim() != 3 or not len(self._columns) or weight.dim() not in (2, 4):
            return False
        groups, size, rank = self._columns.shape
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
        return len(self._columns)

    @property
    def _columns(self) -> Tensor:
        """What the weight of the layer is multiplied by in a fold, (groups, C/g, C/g or rank)."""
        return self._low_rank[1] if self.weight is None else self.weight

    @property
    def _low_rank(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.scale is not None and self.up is not None and self.down is not None
        return self.scale, self.up, self.down

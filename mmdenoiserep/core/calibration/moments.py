"""Mean and covariance of features, gathered batch by batch."""

from typing import Any

import torch
from torch import Tensor

from ..utils.errors import InputError


class CalibrationError(InputError, ValueError):
    """A model, images or moments that can't be calibrated; the message names the layer or the option."""


RIDGE = 0.01
"""Share of the mean variance in the training domain that a fit adds to every variance, on both sides."""


def gather_processes(value: Any) -> list[Any]:
    """Returns what each process has, in the order of the ranks; a single process has its own value only."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class Moments:
    """Number, mean and covariance of feature vectors, in blocks of channels.

        ``n``,   ``mu = E[x]``,   ``S = E[(x - mu) (x - mu)^T] = M / n``

    Two sets of vectors a and b are merged without a difference of large numbers (Chan, Golub and LeVeque 1979): with
    ``delta = mu_b - mu_a``

        ``M = M_a + M_b + delta delta^T n_a n_b / (n_a + n_b)``,   ``mu = mu_a + delta n_b / (n_a + n_b)``

    The products of one batch are taken in its own precision, float32 at least, and summed up in float64.

    Args:
        groups: Number of blocks; channels of different blocks are taken as unrelated.
        size: Channels of a block.
        device: Where the sums are kept.

    Attributes:
        count: n, the vectors seen.
        mean: mu, float64, (groups, size).
        scatter: M, float64, (groups, size, size).
    """

    def __init__(self, groups: int, size: int, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(groups, size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self._root: Tensor | None = None  # where a file has it

    @classmethod
    def from_root(cls, count: int, mean: Tensor, root: Tensor) -> 'Moments':
        """Returns the moments of which :meth:`root` is known, which saves a decomposition.

        From ``R^2 = S + r I`` and ``r = RIDGE tr(S) / C`` follows ``r = RIDGE / (1 + RIDGE) tr(R^2) / C``.

        Args:
            count: n.
            mean: mu, (groups, size).
            root: R, (groups, size, size).
        """
        moments = cls(mean.shape[0], mean.shape[1], mean.device)
        square = (root @ root).double()
        ridge = RIDGE / (1 + RIDGE) * square.diagonal(dim1=1, dim2=2).mean().item()
        moments.count = count
        moments.mean += mean
        moments.scatter += add_ridge(square, -ridge) * count
        moments._root = root
        return moments

    @property
    def covariance(self) -> Tensor:
        """S, float64, (groups, size, size)."""
        return self.scatter / max(self.count, 1)

    @property
    def variance(self) -> float:
        """The mean variance of all channels."""
        return (self.scatter.diagonal(dim1=1, dim2=2).mean() / max(self.count, 1)).item()

    def root(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns ``(S + r I)^1/2``, (groups, size, size), with the ridge r of :data:`RIDGE` mean variances."""
        if self._root is None:
            return power(add_ridge(self.covariance, RIDGE * self.variance).to(dtype), 0.5)
        return self._root.to(dtype)

    def factor(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns L, lower triangular, of ``S + r I = L L^T``, (groups, size, size), with the ridge of :meth:`root`."""
        return torch.linalg.cholesky(add_ridge(self.covariance, RIDGE * self.variance).to(dtype))

    @property
    def second_moment(self) -> Tensor:
        """E[x x^T], float64, (groups, size, size)."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    def about_zero(self) -> 'Moments':
        """Returns moments about zero instead of the mean: a mean of 0 and a covariance of E[x x^T]."""
        moments = self._empty()
        moments.count, moments.scatter = self.count, self.second_moment * self.count
        return moments

    def to(self, device: torch.device | str) -> 'Moments':
        """Returns these moments on a device."""
        moments = Moments(0, 0, device)
        moments.count, moments.mean, moments.scatter = self.count, self.mean.to(device), self.scatter.to(device)
        moments._root = None if self._root is None else self._root.to(device)
        return moments

    @classmethod
    def of(cls, x: Tensor) -> 'Moments':
        """Returns the moments of some vectors, (groups, size, n)."""
        moments = cls(x.shape[0], x.shape[1], x.device)
        moments.update(x)
        return moments

    def update(self, x: Tensor) -> None:
        """Adds the vectors of a batch, (groups, size, n), of any floating dtype."""
        if not x.shape[-1]:
            return
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            mean = x.mean(-1, keepdim=True)
            centred = x - mean
            self._add(x.shape[-1], mean[..., 0].double(), centred @ centred.mT)

    @torch.no_grad()
    def mapped(self, weight: Tensor, bias: Tensor | None) -> 'Moments':
        """Returns the moments of ``W x + b``, of one group.

        Args:
            weight: W, (C_out, C).
            bias: b, (C_out,).
        """
        weight = weight.to(self.mean)
        moments = Moments(0, 0)
        moments.count = self.count
        moments.mean = self.mean @ weight.mT if bias is None else self.mean @ weight.mT + bias
        moments.scatter = weight @ self.scatter @ weight.mT
        return moments

    def merged(self, other: 'Moments') -> 'Moments':
        """Returns the moments of all vectors of both."""
        moments = self._empty()
        moments.merge(self)
        moments.merge(other)
        return moments

    def merge(self, other: 'Moments') -> None:
        """Adds all vectors that other moments have seen."""
        self._add(other.count, other.mean.to(self.mean), other.scatter.to(self.scatter))

    def _empty(self) -> 'Moments':
        """Returns moments of no vectors, of this shape, on this device."""
        groups, size = self.mean.shape
        return Moments(groups, size, self.mean.device)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        self._root = None
        delta = mean - self.mean
        self.scatter += scatter  # in place, whatever the dtype: large matrices are slow to allocate
        self.scatter.addcmul_(delta[:, :, None], delta[:, None, :], value=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def merge_processes(self) -> None:
        """Makes these the moments of all processes, where there are several (``torch.distributed``)."""
        own = gather_processes((self.count, self.mean.cpu(), self.scatter.cpu()))
        if len(own) == 1:
            return
        self.count, self.mean, self.scatter = 0, torch.zeros_like(self.mean), torch.zeros_like(self.scatter)
        for count, mean, scatter in own:  # in the order of the ranks, so that all processes get the same bits
            self._add(count, mean.to(self.mean), scatter.to(self.scatter))


def add_ridge(matrix: Tensor, ridge: float) -> Tensor:
    """Returns matrices, (groups, size, size), with a number added to the diagonal."""
    matrix = matrix.clone()
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    return matrix


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Returns a power of symmetric positive matrices, (groups, size, size)."""
    values, vectors = torch.linalg.eigh(matrix)
    info = torch.finfo(values.dtype)
    smallest = (values.amax(-1, keepdim=True) * info.eps).clamp_min(info.tiny)  # a dead layer has no variance at all
    return vectors * values.maximum(smallest)[:, None, :] ** exponent @ vectors.mT

"""The loss of the denoisers of several layers, with a limited curvature."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.tensors import join
from .correction import Correction
from .schedule import ReverseStep

BATCH_ELEMENTS = 2**18
"""Elements of the features that are computed at a time: 1 MiB in float32, little beside those of a backbone."""


class Part(NamedTuple):
    """What one call of a layer adds to its loss.

    Attributes:
        layer: Number of the layer.
        correction: Its correction.
        step: The constants of its timestep.
        vectors: Features that it took, (groups, C/g, n), in the dtype of the correction.
        share: Weight of this call in the loss of the layer.
    """

    layer: int
    correction: Correction
    step: ReverseStep
    vectors: Tensor
    share: float


def losses_of(parts: Sequence[Part], layers: int, limit: float) -> Tensor:
    """Returns the loss of each layer, the weighted sum over its calls, see :meth:`~.correction.Correction.losses`.

    Small calls of the same shapes are computed at once, since they cost little but the calls of operators.

    Args:
        parts: Calls of all layers.
        layers: Number of layers.
        limit: See :func:`limit_curvature`.

    Returns:
        (layers,), in the largest dtype of the parts.
    """
    found = []
    for same in _batches(parts):
        blocks, first = Correction.stacked([part.correction for part in same]), same[0].vectors
        vectors = join([part.vectors for part in same])  # (layers * groups, C/g, n)
        constants = torch.tensor([(*part.step, part.share) for part in same], dtype=torch.float64, device='cpu')
        *values, shares = constants.to(first.dtype).to(first.device).T  # (layers,) each; some devices have no float64
        step = ReverseStep(*(value.repeat_interleave(len(first)) for value in values))  # (layers * groups,) each
        losses = blocks.losses(vectors, step).reshape(len(same), -1).mean(1) * shares
        curvatures = blocks.curvatures(vectors, step).reshape(len(same), -1).amax(1) * shares / len(first)
        numbers = torch.tensor([part.layer for part in same], device=first.device)
        found.append((numbers, torch.stack([losses, curvatures])))
    numbers, both = torch.cat([n for n, _ in found]), torch.cat([values for _, values in found], 1)  # (2, parts)
    sums = both.new_zeros(2, layers).index_add(1, numbers, both)
    return limit_curvature(sums[0], sums[1].detach(), limit)


def _batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yields parts of the same shapes, as many at a time as :data:`BATCH_ELEMENTS` allows, but at least one."""
    alike = defaultdict(list)
    for part in parts:
        shapes = tuple((name, value.shape) for name, value in part.correction.tensors.items())
        alike[part.vectors.shape, part.vectors.dtype, shapes].append(part)
    for same in alike.values():
        number = max(1, BATCH_ELEMENTS // max(1, same[0].vectors.numel()))
        for start in range(0, len(same), number):
            yield same[start : start + number]


def limit_curvature(loss: Tensor, curvature: Tensor, limit: float) -> Tensor:
    """Returns the same loss, whose gradient is scaled down until its curvature is at most ``limit``.

        ``gradient * 2^-k``,   the smallest ``k >= 0`` with ``2^-k curvature <= limit``

    Gradient descent diverges where the learning rate times the curvature exceeds 2, and the curvature of this loss
    grows with the square of the features: to about 1e10 at the first layer of a model whose images range from 0 to 255.
    The scaling moves no minimum. Powers of two cause no rounding, and rarely change from one batch to the next.

    Args:
        loss: One or more losses.
        curvature: Curvature of each loss, of the same shape, see :meth:`~.correction.Correction.curvatures`.
        limit: Largest curvature; ``math.inf`` leaves the gradient as it is.
    """
    exponent = torch.log2(curvature / limit).ceil().clamp_min(0)
    return loss.detach() + (loss - loss.detach()) * torch.exp2(-exponent)

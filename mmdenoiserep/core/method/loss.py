"""Limits the curvature of the denoising loss."""

import torch
from torch import Tensor


def limit_curvature(loss: Tensor, curvature: Tensor, limit: float) -> Tensor:
    """Returns the same loss, whose gradient is scaled down until its curvature is at most ``limit``.

        ``gradient * 2^-k``,   the smallest ``k >= 0`` with ``2^-k curvature <= limit``

    Gradient descent diverges where the learning rate times the curvature exceeds 2, and the curvature of this loss
    grows with the square of the features: to about 1e10 at the first layer of a model whose images range from 0 to 255.
    The scaling moves no minimum. Powers of two cause no rounding, and rarely change from one batch to the next.

    Args:
        loss: A scalar.
        curvature: Curvature of the loss, a scalar, see :meth:`~.correction.Correction.curvature`.
        limit: Largest curvature; ``math.inf`` leaves the gradient as it is.
    """
    exponent = torch.log2(curvature / limit).ceil().clamp_min(0)
    return loss.detach() + (loss - loss.detach()) * torch.exp2(-exponent)

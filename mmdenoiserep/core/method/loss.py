"""How steep the loss of a denoiser may be."""

import torch
from torch import Tensor


def limit_curvature(loss: Tensor, curvature: Tensor, limit: float) -> Tensor:
    """Returns the same value with a gradient that is small enough for a curvature of at most ``limit``.

        ``gradient * 2^-k``,   the smallest ``k >= 0`` with ``2^-k curvature <= limit``

    Gradient descent diverges where the learning rate times the curvature exceeds 2, and the curvature of this loss
    grows with the square of the features: about 1e10 at the first layer of a model that takes images from 0 to 255. The
    limit moves no minimum. A power of two rounds nothing, and stays the same from one batch to the next unless the
    curvature crosses one.

    Args:
        loss: A scalar.
        curvature: Its curvature, from :meth:`~.correction.Correction.curvature`.
        limit: The largest curvature that the caller's optimizer takes; ``math.inf`` leaves the gradient as it is.
    """
    exponent = torch.log2(curvature / limit).ceil().clamp_min(0)
    return loss.detach() + (loss - loss.detach()) * torch.exp2(-exponent)

"""The loss of a denoiser: the expected error of its noise prediction, and how steep it may be."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .schedule import ReverseStep


def denoise_loss(parameters: Mapping[str, Tensor], vectors: Tensor, step: ReverseStep) -> Tensor:
    """Returns the error of predicting the noise in features, with the noise integrated out.

        ``L = E_eps |eps - (D x_t + d)|^2 / C,   x_t = sqrt(abar) x + sqrt(1 - abar) eps``
        ``  = ( |sqrt(abar) D x + d|^2 + |I - sqrt(1 - abar) D|_F^2 ) / C``, averaged over the vectors x

    with ``D = (B + (c3 - 1) I) / c1`` and ``d = b~ / c1``: no sampling of noise, so no variance. No C x C matrix is
    built at low rank: ``|a I - U V|_F^2 = a^2 C - 2 a tr(U V) + sum(U^T U * V V^T)``.

    Args:
        parameters: Those of the :class:`Denoiser` by name.
        vectors: Features x, shape (groups, C/g, n), in the dtype of the parameters. Without any the loss is 0.
        step: The constants of the layer's timestep.

    Returns:
        A scalar.
    """
    if vectors.numel() == 0:
        return zero_loss(parameters.values())
    groups, size, _ = vectors.shape
    noise = step.noise / step.c1
    x = vectors * step.signal
    if 'weight' in parameters:
        matrix = parameters['weight']
        identity = torch.eye(size, device=matrix.device, dtype=matrix.dtype)
        correction = matrix @ x
        residual = (identity - noise * (matrix + step.c3_minus_1 * identity)).square().sum()
    else:
        scale, up, down = (parameters[name] for name in ('scale', 'up', 'down'))
        correction = torch.baddbmm(x * scale[:, None, None], up, down @ x)
        rest = 1 - noise * (scale + step.c3_minus_1)
        trace = noise * (up * down.mT).sum((1, 2))
        square = noise**2 * ((up.mT @ up) * (down @ down.mT)).sum((1, 2))
        residual = (rest.square() * size - 2 * rest * trace + square).sum()
    if 'bias' in parameters:
        correction = correction + parameters['bias'].reshape(groups, size, 1)
    prediction = torch.add(correction, x, alpha=step.c3_minus_1) / step.c1
    return prediction.square().mean() + residual / (groups * size)


def zero_loss(parameters: Iterable[Tensor]) -> Tensor:
    """Returns 0 with a gradient of 0 for every parameter: several processes have to agree on who has a gradient."""
    return torch.stack([p.sum() * 0 for p in parameters]).sum()


@torch.no_grad()
def curvature(parameters: Mapping[str, Tensor], vectors: Tensor, step: ReverseStep) -> Tensor:
    """Returns a bound of the largest curvature of :func:`denoise_loss` in its parameters.

    The loss is a sum of squares ``|r|^2``, so its curvature near the minimum is that of ``2 J^T J``, with J the
    derivative of r. Per group,

        full:      ``2 / (C c1^2) * (q + 1)``
        low rank:  ``2 / (C c1^2) * (q (1 + |up|^2 + |down|^2) + 1)``,   ``q = abar E|x|^2 + (1 - abar) C/g``

    where q is the trace of the second moment of the noised features, which bounds its largest eigenvalue, and the 1 is
    the bias, if there is one. The largest over the groups counts.

    Args:
        parameters: Those of the :class:`Denoiser` by name.
        vectors: Features x, shape (groups, C/g, n), in the dtype of the parameters.
        step: The constants of the layer's timestep.

    Returns:
        A scalar, 0 without vectors.
    """
    if vectors.numel() == 0:
        return vectors.new_zeros(())
    groups, size, _ = vectors.shape
    square = step.signal**2 * vectors.square().sum(1).mean(1) + step.noise**2 * size  # q, (groups,)
    if 'up' in parameters:
        square = square * (1 + sum(parameters[name].square().sum((1, 2)) for name in ('up', 'down')))
    return 2 / (groups * size * step.c1**2) * (square.amax() + ('bias' in parameters))


def limit_curvature(loss: Tensor, curvature: Tensor, limit: float) -> Tensor:
    """Returns the same value with a gradient that is small enough for a curvature of at most ``limit``.

        ``gradient * 2^-k``,   the smallest ``k >= 0`` with ``2^-k curvature <= limit``

    Gradient descent diverges where the learning rate times the curvature exceeds 2, and the curvature of this loss
    grows with the square of the features: about 1e10 at the first layer of a model that takes images from 0 to 255. The
    limit moves no minimum. A power of two rounds nothing, and stays the same from one batch to the next unless the
    curvature crosses one.

    Args:
        loss: A scalar.
        curvature: Its curvature, from :func:`curvature`.
        limit: The largest curvature that the caller's optimizer takes; ``math.inf`` leaves the gradient as it is.
    """
    exponent = torch.log2(curvature / limit).ceil().clamp_min(0)
    return loss.detach() + (loss - loss.detach()) * torch.exp2(-exponent)

"""The loss of a denoiser: the expected error of its noise prediction."""

from collections.abc import Mapping

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
        return sum((p.sum() for p in parameters.values()), vectors.new_zeros(())) * 0
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

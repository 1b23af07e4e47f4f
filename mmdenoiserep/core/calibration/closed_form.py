"""The denoiser that minimises the loss, from the moments of a layer's input: no training."""

import torch
from torch import Tensor

from ..method.schedule import ReverseStep


def closed_form(
    mean: Tensor, second_moment: Tensor, step: ReverseStep, rank: int | None = None, bias: bool = True
) -> dict[str, Tensor]:
    """Solves for the optimum of :meth:`DenoiseLayer.denoise_loss` over all inputs with the given moments.

    With ``S = E[x x^T] - mu mu^T`` (or ``S = E[x x^T]`` without a bias) and ``Sigma = abar S + (1 - abar) I``,

        ``D* = sqrt(1 - abar) Sigma^-1``,   ``d* = -sqrt(abar) D* mu``

    At low rank ``D = a I + U V``: in the eigenbasis of Sigma the loss is ``sum_i sigma_i (delta_i - delta*_i)^2 / C``
    with ``delta*_i = sqrt(1 - abar) / sigma_i``. The directions that keep their own value are the largest and the
    smallest ones, since the cost of giving one up is convex in sigma; a is fitted to the rest,
    ``a = sqrt(1 - abar) / mean(sigma_rest)``; every split between the two ends is tried, so this is the optimum.

    Args:
        mean: mu, shape (groups, C/g).
        second_moment: E[x x^T], shape (groups, C/g, C/g).
        step: The constants of the layer's timestep.
        rank: None or at least C/g gives the full matrix.
        bias: Whether the denoiser has a bias.

    Returns:
        The parameters of a :class:`Denoiser` by name, float64.
    """
    mean, second_moment = mean.double(), second_moment.double()
    groups, size = mean.shape
    covariance = second_moment - mean[:, :, None] * mean[:, None, :] if bias else second_moment
    identity = torch.eye(size, dtype=torch.float64, device=mean.device)
    sigma = step.signal**2 * covariance + step.noise**2 * identity  # (groups, C/g, C/g)

    if rank is None or rank >= size:
        prediction = step.noise * torch.cholesky_inverse(torch.linalg.cholesky(sigma))
        parameters = {'weight': step.c1 * prediction - step.c3_minus_1 * identity}
    else:
        variances, directions = torch.linalg.eigh(sigma)
        optimum = step.noise / variances
        solutions = [_truncate(variances[g], optimum[g], directions[g], step, rank) for g in range(groups)]
        scale, up, down = (torch.stack(parts) for parts in zip(*solutions, strict=True))
        prediction = ((scale[:, None, None] + step.c3_minus_1) * identity + up @ down) / step.c1
        parameters = {'scale': scale, 'up': up, 'down': down}
    if bias:
        parameters['bias'] = -step.c1 * step.signal * (prediction @ mean[:, :, None]).flatten()
    return parameters


def _truncate(
    variances: Tensor, optimum: Tensor, directions: Tensor, step: ReverseStep, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (scale, up, down) of one group, from its eigenvalues in ascending order."""
    best, kept, level = torch.inf, slice(0), optimum.new_zeros(())
    for smallest in range(rank + 1):
        rest = slice(smallest, len(variances) - rank + smallest)
        a = step.noise / variances[rest].mean()
        cost = (variances[rest] * (a - optimum[rest]) ** 2).sum().item()
        if cost < best:
            best, kept, level = cost, rest, a
    keep = torch.ones(len(variances), dtype=torch.bool, device=variances.device)
    keep[kept] = False
    up = directions[:, keep] * (step.c1 * (optimum[keep] - level))
    return step.c1 * level - step.c3_minus_1, up, directions[:, keep].mT

"""The map that gives features the moments which they have in the training domain, as far as the images support it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .moments import RIDGE, CalibrationError, Moments, add_ridge, power


class Support(NamedTuple):
    """How much of the difference of two domains a fit corrects, 0 to 1.

    Attributes:
        covariance: Share of ``S_t - S_s``.
        mean: Share of ``mu_t - mu_s``.
    """

    covariance: float = 1.0
    mean: float = 1.0

    def scaled(self, factor: float) -> 'Support':
        """Returns a share of these shares."""
        return Support(factor * self.covariance, factor * self.mean)


FULL = Support()
"""All of it."""


def transport(
    source: Moments,
    target: Moments,
    support: Support = FULL,
    dtype: torch.dtype = torch.float64,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns A and c of ``x' = A x + c``, which carries moments of the target to those of the source.

        ``A = I + s (R - I)``,   ``R = S_s^1/2 S^-1/2``               (re-colouring; symmetric roots)
        ``c = mu_t + s p_mean (mu_s - mu_t) - A mu_t``

    with ``S = S_s + p_covariance (S_t - S_s)`` and a ridge of :data:`RIDGE` times the mean source variance on both
    covariances. With full support and strength, x' has the moments of the source; for ``S_t = S_s + sigma^2 I`` and no
    ridge this is the probability-flow denoiser of a Gaussian feature. Without any support, the map is the identity.

    Args:
        source: Moments in the training domain.
        target: Moments in the deployment domain, of the same shape.
        support: p of the covariance and of the mean, see :func:`find_support`.
        dtype: Precision of the roots.
        strength: s, 0 to 1.

    Returns:
        A, of that dtype, (groups, size, size), and c, float64, (groups, size).

    Raises:
        CalibrationError: The shapes differ, or one side has seen nothing.
    """
    if source.mean.shape != target.mean.shape:
        raise CalibrationError(f'moments of {tuple(source.mean.shape)} and {tuple(target.mean.shape)} channels differ')
    if not (source.count and target.count):
        raise CalibrationError('moments of no image at all')
    goal = torch.lerp(target.mean, source.mean, strength * support.mean)
    identity = torch.eye(goal.shape[1], dtype=dtype, device=goal.device).expand_as(target.scatter)
    if not support.covariance:
        return identity, goal - target.mean
    covariance = add_ridge(
        torch.lerp(source.covariance, target.covariance, support.covariance), RIDGE * source.variance
    )
    linear = torch.lerp(identity, source.root(dtype) @ power(covariance.to(dtype), -0.5), strength)
    return linear, goal - (linear.double() @ target.mean[:, :, None])[..., 0]


def find_support(source: Moments, halves: tuple[Moments, Moments], factor: Tensor) -> Support:
    """Returns how much of the difference of two domains the images support.

    The moments of two halves a and b of the target's images show the error of the target's moments: for independent
    halves, ``E|S_t - E S_t|^2 = w E|S_a - S_b|^2`` with ``w = n_a n_b / n_t^2``, 1/4 for halves of one size. The
    expected error of ``(1 - rho) (S_t - S_s)``, the difference of two estimates, is then least for, as in Ledoit and
    Wolf (2004),

        ``rho = min(1, (1 + n_t / n_s) w |S_a - S_b|^2 / |S_t - S_s|^2)``,   ``|D| = |L^-1 D L^-T|_F``

    and the same of the means with ``|d| = |L^-1 d|``. ``S_s + r I = L L^T`` makes directions of little variance count
    as much as the others; the first factor adds the error of the source, on n_s sampled vectors instead of n_t. Halves
    that differ by content, as :class:`ImageVectors` makes them, count differences of content as error too: a difference
    of domains that another choice of images could explain is left alone.

    Args:
        source: Moments in the training domain.
        halves: Moments of both halves in the deployment domain.
        factor: L, lower triangular, (groups, size, size).

    Returns:
        ``1 - rho`` of the covariance and of the mean.
    """
    first, second = halves
    target = first.merged(second)
    error = (1 + target.count / source.count) * first.count * second.count / target.count**2

    def whiten(columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, columns, upper=False)

    def share(halves: Tensor, domains: Tensor) -> float:
        """Returns 1 - rho from the whitened differences of the halves and of the domains."""
        ours, theirs = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (halves, domains))
        return max(0.0, 1 - error * (ours / theirs) ** 2) if theirs else 0.0

    pairs = (first, second), (target, source)
    return Support(
        covariance=share(*(whiten(whiten((a.covariance - b.covariance).to(factor)).mT) for a, b in pairs)),
        mean=share(*(whiten((a.mean - b.mean)[..., None].to(factor)) for a, b in pairs)),
    )

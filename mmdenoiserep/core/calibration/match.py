"""The affine map that gives features the mean and the covariance which they have in the training domain."""

import torch
from torch import Tensor

from .moments import CalibrationError, Moments

RIDGE = 0.01
"""Share of the mean source variance that is added to every variance on both sides."""

RANKED = ('full', 'covariance')
FITS = (*RANKED, 'diagonal', 'mean')
"""What may be carried; a rank says something of the first ones only."""


def transport(
    source: Moments, target: Moments, fit: str = 'full', rank: int | None = None, prior: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns A and c of ``x' = A x + c``, which carries the target's moments to the source's.

        full:        ``A = S_s^1/2 S_t^-1/2``    (re-colouring; symmetric roots)
        diagonal:    the same of the variances alone
        mean:        ``A = I``
        ``c = mu_s - A mu_t``
        covariance:  A as for full, but ``c = mu_t - A mu_t``: the mean, which depends on what the images show, stays

    both covariances with a ridge of :data:`RIDGE` times the mean source variance. For ``S_t = S_s + sigma^2 I`` and no
    ridge this is the probability-flow denoiser of a Gaussian feature. At low rank, ``A - I`` keeps the directions in
    which it is largest (singular values).

    Args:
        source: Moments in the training domain.
        target: Moments in the deployment domain, of the same shape.
        fit: ``'full'``, ``'covariance'``, ``'diagonal'`` or ``'mean'``.
        rank: Rank of ``A - I`` in each group, where the fit is in :data:`RANKED`; None for full.
        prior: Weight of the source in the target's moments, 0 to 1; ``n_0 / (n_0 + n)`` for a prior worth n_0 images.

    Returns:
        A, float64, (groups, size, size), and c, float64, (groups, size).

    Raises:
        CalibrationError: The shapes differ, one side has seen nothing, or fit or rank is unknown.
    """
    if fit not in FITS:
        raise CalibrationError(f'fit must be one of {", ".join(FITS)}, got {fit!r}')
    if rank is not None and rank < 1:
        raise CalibrationError(f'rank must be 1 or more, or None for a full map, got {rank}')
    if source.mean.shape != target.mean.shape:
        raise CalibrationError(f'moments of {tuple(source.mean.shape)} and {tuple(target.mean.shape)} channels differ')
    if not (source.count and target.count):
        raise CalibrationError('moments of no image at all')
    mean = torch.lerp(target.mean, source.mean, prior)
    identity = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device).expand_as(target.scatter)
    if fit == 'mean':
        return identity, source.mean - mean
    cov_s = source.covariance
    cov_t = torch.lerp(target.covariance, cov_s, prior)
    ridge = RIDGE * cov_s.diagonal(dim1=1, dim2=2).mean()
    if fit == 'diagonal':
        smallest = torch.finfo(cov_s.dtype).tiny  # a dead layer has no variance and no ridge
        var_s, var_t = ((c.diagonal(dim1=1, dim2=2) + ridge).clamp_min(smallest) for c in (cov_s, cov_t))
        linear = torch.diag_embed((var_s / var_t).sqrt())
    else:
        linear = _power(cov_s + ridge * identity, 0.5) @ _power(cov_t + ridge * identity, -0.5)
        if rank is not None and rank < identity.shape[-1]:
            change = linear - identity
            largest = torch.linalg.eigh(change.mT @ change).eigenvectors[..., -rank:]  # right singular vectors
            linear = identity + change @ largest @ largest.mT
    goal = mean if fit == 'covariance' else source.mean
    return linear, goal - (linear @ mean[:, :, None])[..., 0]


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Returns a power of symmetric positive matrices, (groups, size, size)."""
    values, vectors = torch.linalg.eigh(matrix)
    info = torch.finfo(values.dtype)
    smallest = (values.amax(-1, keepdim=True) * info.eps).clamp_min(info.tiny)  # a dead layer has no variance at all
    return vectors * values.maximum(smallest)[:, None, :] ** exponent @ vectors.mT

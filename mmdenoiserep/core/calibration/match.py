"""The map that gives features the moments which they have in the training domain, and how much of it is safe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .moments import RIDGE, CalibrationError, Moments, add_ridge, power

FITS = ('full', 'covariance', 'diagonal', 'mean')
"""What may be carried."""


def transport(
    source: Moments,
    target: Moments,
    fit: str = 'full',
    prior: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Returns A and c of ``x' = A x + c``, which carries the target's moments to the source's.

        full:        ``A = S_s^1/2 S_t^-1/2``    (re-colouring; symmetric roots)
        diagonal:    the same of the variances alone
        mean:        ``A = I``
        ``c = mu_s - A mu_t``
        covariance:  A as for full, but ``c = mu_t - A mu_t``: the mean, which depends on what the images show, stays

    both covariances with a ridge of :data:`RIDGE` times the mean source variance. For ``S_t = S_s + sigma^2 I`` and no
    ridge this is the probability-flow denoiser of a Gaussian feature.

    Args:
        source: Moments in the training domain.
        target: Moments in the deployment domain, of the same shape.
        fit: ``'full'``, ``'covariance'``, ``'diagonal'`` or ``'mean'``.
        prior: Weight of the source in the target's moments, 0 to 1; ``n_0 / (n_0 + n)`` for a prior worth n_0 images.
        dtype: Precision of the roots.

    Returns:
        A, of that dtype, (groups, size, size), and c, float64, (groups, size).

    Raises:
        CalibrationError: The shapes differ, one side has seen nothing, or the fit is unknown.
    """
    if fit not in FITS:
        raise CalibrationError(f'fit must be one of {", ".join(FITS)}, got {fit!r}')
    if source.mean.shape != target.mean.shape:
        raise CalibrationError(f'moments of {tuple(source.mean.shape)} and {tuple(target.mean.shape)} channels differ')
    if not (source.count and target.count):
        raise CalibrationError('moments of no image at all')
    mean = torch.lerp(target.mean, source.mean, prior)
    if fit == 'mean':
        identity = torch.eye(mean.shape[1], dtype=dtype, device=mean.device)
        return identity.expand_as(target.scatter), source.mean - mean
    covariance = target.covariance
    if prior:
        covariance = torch.lerp(covariance, source.covariance, prior)
    ridge = RIDGE * source.variance
    if fit == 'diagonal':
        smallest = torch.finfo(torch.float64).tiny  # a dead layer has no variance and no ridge
        diagonals = (source.covariance.diagonal(dim1=1, dim2=2), covariance.diagonal(dim1=1, dim2=2))
        var_s, var_t = ((diagonal + ridge).clamp_min(smallest) for diagonal in diagonals)
        linear = torch.diag_embed((var_s / var_t).sqrt()).to(dtype)
    else:
        linear = source.root(dtype) @ power(add_ridge(covariance, ridge).to(dtype), -0.5)
    goal = mean if fit == 'covariance' else source.mean
    return linear, goal - (linear.double() @ mean[:, :, None])[..., 0]


FEW, MANY = 32, 512
"""Images below which the later layers, and from which on all layers, can be fitted; measured, see docs/domain.md."""

PRIOR = 16
"""Images that the source is worth below :data:`MANY`, or where the mix of classes is unknown."""


def early_half(layers: Sequence[str]) -> tuple[str, ...]:
    """Returns the first half of the layers, with the middle one of an odd number."""
    return tuple(layers[: (len(layers) + 1) // 2])


def safe_fit(layers: Sequence[str], images: int, representative: bool = False) -> dict[str, Any]:
    """Returns the options of a domain fit that were found to risk least on small models.

    docs/domain.md has what they cost. On a DINOv2 ViT-S all layers with 512 images did harm, also on images of the
    training domain (docs/which-when.md, one seed); the first case did not.

    Early layers carry most of what a fit recovers from noise or blur. Late layers hold classes: fitted to images of
    other classes than the training had, or to few images, they unlearn. The mean of any layer moves with the mix of
    classes. So only these are touched:

        unknown mix, or fewer than :data:`FEW` images:  the first layer, its covariance but not its mean
        fewer than :data:`MANY`:  the early half, mean and covariance
        more:                     all layers, mean and covariance

    with a prior worth :data:`PRIOR` images in the first two cases. The first one harms where the light is another one,
    because the mean stays: look at :attr:`CalibratedLayer.moved`.

    Args:
        layers: Names of all layers, first executed first.
        images: Number of images to fit on.
        representative: Whether they show the classes about as often as the training images did.

    Returns:
        ``layers``, ``fit`` and ``prior`` for :func:`fit_domain`.
    """
    if not representative or images < FEW:
        return dict(layers=tuple(layers[:1]), fit='covariance', prior=float(PRIOR))
    if images < MANY:
        return dict(layers=early_half(layers), fit='full', prior=float(PRIOR))
    return dict(layers=tuple(layers), fit='full', prior=0.0)

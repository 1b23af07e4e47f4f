"""How much of a model a domain fit may change, for the images that it has."""

from collections.abc import Sequence
from typing import Any

FEW, MANY = 32, 512
"""Images below which the later layers, and from which on all layers, can be fitted; measured, see docs/domain.md."""

PRIOR = 16
"""Images that the source is worth below :data:`MANY`, or where the mix of classes is unknown."""

RANK = 64
"""Rank of the maps, less the identity, from :data:`MANY` on."""


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
        more:                     all layers, mean and covariance, at rank :data:`RANK`

    with a prior worth :data:`PRIOR` images in the first two cases. The first one harms where the light is another one,
    because the mean stays: look at :attr:`CalibratedLayer.moved`.

    Args:
        layers: Names of all layers, first executed first.
        images: Number of images to fit on.
        representative: Whether they show the classes about as often as the training images did.

    Returns:
        ``layers``, ``fit``, ``rank`` and ``prior`` for :func:`calibrate`.
    """
    if not representative or images < FEW:
        return dict(layers=tuple(layers[:1]), fit='covariance', rank=None, prior=float(PRIOR))
    if images < MANY:
        return dict(layers=early_half(layers), fit='full', rank=None, prior=float(PRIOR))
    return dict(layers=tuple(layers), fit='full', rank=RANK, prior=0.0)

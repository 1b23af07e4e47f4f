"""Agreement of predictions for images and mirrored images, and what predictions say about images; without labels."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_OVERLAP = 0.5
"""Least intersection over union of boxes that agree."""


class Score(NamedTuple):
    """What speaks for a candidate.

    Attributes:
        agreement: Agreement of the predictions for images and for mirrored images, 0 to 1: share of images with the
            same class; share of pixels; share of boxes, weighted by score; share of images that are nearest to their
            mirrored image.
        infomax: ``H(mean p) - mean H(p)`` of a classifier's probabilities of the classes, nats; None for other tasks.
        images: What agrees in each image, and what could agree; the agreement is the ratio of the sums.
        informing: What each image adds to the infomax, ``-sum p log(mean p) - H(p)``, nats; the infomax is its mean.
    """

    agreement: float
    infomax: float | None = None
    images: tuple[tuple[float, float], ...] = ()
    informing: tuple[float, ...] = ()

    def change_from(self, untouched: 'Score') -> tuple[float, float]:
        """Returns the difference of the agreement to that of the untouched model, and its standard error.

        The error is that of a ratio of sums, paired by image: with ``a_i`` of ``t_i`` in image i,
        ``var(d) = (1 + sum_i d_i^2) / (n (n - 1))`` for the differences ``d_i`` of ``(a_i - agreement t_i) / mean(t)``.
        The 1 stands for one more image that disagrees, so that few images, or equal ones, are no proof.
        """
        ours, theirs = (torch.tensor(score.images, dtype=torch.float64).view(-1, 2) for score in (self, untouched))
        residuals = [
            (agreed - score.agreement * total) / total.mean().clamp_min(torch.finfo(total.dtype).tiny)
            for score, (agreed, total) in ((self, ours.T), (untouched, theirs.T))
        ]
        return self.agreement - untouched.agreement, standard_error(residuals[0] - residuals[1])

    def infomax_change_from(self, untouched: 'Score') -> tuple[float, float]:
        """Returns the difference of the infomax to that of the untouched model, and its standard error, nats.

        The error is that of a mean, paired by image; that of the mean probabilities is of second order.
        """
        if self.infomax is None or untouched.infomax is None:
            return 0.0, torch.inf
        ours, theirs = (torch.tensor(score.informing, dtype=torch.float64) for score in (self, untouched))
        differences = ours - theirs
        return self.infomax - untouched.infomax, standard_error(differences - differences.mean())


def standard_error(residuals: Tensor) -> float:
    """Returns the standard error of a mean from the residuals of n images, and of one more image with a residual of 1.

    Args:
        residuals: (n,), of mean 0.
    """
    count = len(residuals)
    return ((1 + residuals.square().sum()) / (count * (count - 1))).sqrt().item() if count > 1 else torch.inf


def predict(model: Any, packed: Mapping[str, Any], mirror: bool = False) -> list[Any]:
    """Returns the predictions for a batch before the data preprocessor.

    Args:
        model: The model.
        packed: The batch; it is not changed.
        mirror: Whether to mirror the images, left to right.
    """
    rest = copy.deepcopy({key: value for key, value in packed.items() if key != 'inputs'})  # models write into it
    images = list(packed['inputs'])
    if mirror:
        samples = packed.get('data_samples') or [None] * len(images)
        images = [mirror_content(*pair) for pair in zip(images, samples, strict=True)]
    return model.test_step(dict(rest, inputs=images))


def mirror_content(image: Tensor, sample: Any) -> Tensor:
    """Returns an image, (C, H, W), mirrored left to right; padding on its right, known from its data sample, stays."""
    shape, scale = getattr(sample, 'ori_shape', None), getattr(sample, 'scale_factor', None)
    width = image.shape[-1]
    if shape is not None and scale is not None:
        width = min(width, max(1, round(shape[1] * float(np.ravel(scale)[0]))))
    return torch.cat([image[..., :width].flip(-1), image[..., width:]], -1)


@dataclass
class Tally:
    """Sums over images of what :class:`Score` needs.

    Attributes:
        images: Number of images.
        agreed: What agrees in each image, and what could agree: 1, a share of pixels, or scores of boxes.
        probabilities: Probabilities of the classes of each image, (C,), float64; empty without probabilities.
        features: Features of images, (C,) each.
        mirrored: Features of the mirrored images.
    """

    images: int = 0
    agreed: list[tuple[float, float]] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    mirrored: list[Tensor] = field(default_factory=list)

    def add(self, other: 'Tally') -> None:
        """Adds the sums of other images."""
        self.images += other.images
        self.agreed += other.agreed
        self.probabilities += other.probabilities
        self.features += other.features
        self.mirrored += other.mirrored

    def score(self) -> Score:
        """Returns the score of all images."""
        images = tuple(find_mirrored(self) if self.features else self.agreed)
        agreed, total = (sum(values) for values in zip(*images, strict=True)) if images else (0.0, 0.0)
        agreement = agreed / total if total else 0.0
        if len(self.probabilities) < max(self.images, 1):
            return Score(agreement, None, images)
        own = torch.stack(self.probabilities)  # (images, classes)
        informing = -torch.xlogy(own, own.mean(0)).sum(1) + torch.xlogy(own, own).sum(1)
        return Score(agreement, informing.mean().item(), images, tuple(informing.tolist()))


def tally(sample: Any, mirrored: Any) -> Tally:
    """Compares the prediction for an image with that for the mirrored image."""
    name = next(name for name in TALLIES if hasattr(sample, name))
    return replace(TALLIES[name](sample, mirrored), images=1)


def tally_labels(sample: Any, mirrored: Any) -> Tally:
    """Compares classes, of ``pred_score``, (C,)."""
    first, second = (part.pred_score.double().cpu() for part in (sample, mirrored))
    agreed = float(first.argmax() == second.argmax() and first.isfinite().all() and second.isfinite().all())
    if not torch.isclose(first.sum(), first.new_tensor(1), atol=0.01) or first.min() < 0:
        return Tally(agreed=[(agreed, 1.0)])  # several labels, or similarities
    return Tally(agreed=[(agreed, 1.0)], probabilities=[first])


def tally_pixels(sample: Any, mirrored: Any) -> Tally:
    """Compares the classes of pixels, of ``pred_sem_seg``, (1, H, W), under ``data`` or, in mmdet, ``sem_seg``.

    The infomax of pixels does not count: speckled predictions raise it.
    """
    first, second = (
        getattr(part.pred_sem_seg, 'data' if 'data' in part.pred_sem_seg else 'sem_seg') for part in (sample, mirrored)
    )
    return Tally(agreed=[((first == second.flip(-1)).double().mean().item(), 1.0)])


def tally_boxes(sample: Any, mirrored: Any) -> Tally:
    """Compares ``pred_instances``; each box agrees with one box of its class, and both weigh as much as their scores.

    Args:
        sample: Has ``bboxes`` x1, y1, x2, y2 in pixels, (N, 4), ``labels``, (N,), and ``scores``, (N,), and the height
            and width of the image under ``ori_shape``.
        mirrored: The prediction for the mirrored image.
    """
    first, second = sample.pred_instances.cpu(), mirrored.pred_instances.cpu()
    left, top, right, bottom = second.bboxes.unbind(1)
    width = sample.ori_shape[1]
    overlaps = overlaps_of(first.bboxes, torch.stack([width - right, top, width - left, bottom], 1))
    overlaps[first.labels[:, None] != second.labels] = 0
    agreed = 0.0
    for i in first.scores.argsort(descending=True).tolist() if len(second.scores) else ():
        j = int(overlaps[i].argmax())
        if overlaps[i, j] >= LEAST_OVERLAP:
            agreed += (first.scores[i] + second.scores[j]).item()
            overlaps[:, j] = 0
    return Tally(agreed=[(agreed, (first.scores.sum() + second.scores.sum()).item())])


def tally_features(sample: Any, mirrored: Any) -> Tally:
    """Takes features, ``pred_feature``, (C,), for :func:`find_mirrored`."""
    return Tally(features=[sample.pred_feature.float().cpu()], mirrored=[mirrored.pred_feature.float().cpu()])


TALLIES: dict[str, Callable[[Any, Any], Tally]] = dict(
    pred_feature=tally_features, pred_sem_seg=tally_pixels, pred_instances=tally_boxes, pred_score=tally_labels
)
"""How predictions are compared, by what they hold; the first one that is there counts."""


def find_mirrored(pairs: Tally) -> list[tuple[float, float]]:
    """Returns for each mirrored image whether its own one is nearest, by the cosine of the features, and 1."""
    features, mirrored = (F.normalize(torch.stack(part)) for part in (pairs.features, pairs.mirrored))
    nearest = (mirrored @ features.mT).argmax(1)
    return [(float(own), 1.0) for own in nearest == torch.arange(len(nearest))]


def overlaps_of(first: Tensor, second: Tensor) -> Tensor:
    """Returns the intersection over union of boxes ``x1, y1, x2, y2``, (N, 4) and (M, 4), as (N, M)."""
    sizes = torch.minimum(first[:, None, 2:], second[:, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
    shared = sizes.clamp_min(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp_min(torch.finfo(shared.dtype).tiny)

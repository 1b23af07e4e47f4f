"""Chooses how much of a domain fit to keep, without labels.

A fit of all layers gives several candidates: the untouched model, the fit of the first layer, of the early half, of all
layers, and all layers at half strength. Images that were not fitted on show how well the predictions of each candidate
agree with those for the mirrored images. :func:`decide` keeps as much of the fit as this does not speak against.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import get_rank
from torch import Tensor, nn
from tqdm import tqdm

from ..core import CalibrationError, CalibrationReport, Moments, evaluating
from ..core.calibration.moments import gather_processes
from ..core.calibration.report import make_report
from ..core.calibration.takers import owned_tensors
from ..core.files.fused import STAMP
from ..core.utils.table import format_table
from .calibration import Subject
from .distances import Distances, measure_distances
from .errors import is_from_user
from .images import Batches

NOTHING, HALF_STRENGTH = 'nothing', 'half-strength'
PARTS = ('first', 'early', 'all')
"""The first layer, the first half of the layers, and all layers."""
CANDIDATES = (NOTHING, *PARTS, HALF_STRENGTH)
"""The untouched model; fits of the first layer, the early half and all layers; the mean of first and last."""
PREFERENCE = 'all', 'early', 'first', HALF_STRENGTH
"""The candidates, most complete first; half strength corrects no layer wholly."""
ERRORS = 2
"""Standard errors by which the agreement of a candidate may be lower than that of the untouched model."""
FEW = 10
"""Fewer held-out images show nothing but gross harm."""
HELD_OUT = 200
"""Largest number of images that are kept from the fit."""
LEAST_OVERLAP = 0.5
"""Least intersection over union of boxes that agree."""
NEAR, FAR = (0.8, 1.25), 1.5
"""Local damage: range of the lower quartile, and least mean, of the distances relative to those in training.

Measured: occlusion 1.07 and 1.71 (detection), 1.13 and 6.8 (re-identification), and none of 19 other cases.
"""


def layers_of(layers: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns the layers of one of :data:`PARTS`, with the middle one of an odd number.

    Args:
        layers: All layers by name, first executed first.
        part: The part.
    """
    count = dict(first=1, early=(len(layers) + 1) // 2, all=len(layers))[part]
    return dict(list(layers.items())[:count])


class Candidates:
    """The candidates of one fit, as values for the tensors of the model.

    The layers are fitted in the order of execution, and each tensor by one layer at most. So a fit of the early half is
    the tensors that the early layers changed in a fit of all layers, and the original ones otherwise. The map of a
    layer enters its weight linearly, ``W A``, so the mean of both weights is the weight of the map ``(I + A) / 2``. So
    is the mean of both biases and running means; that of LayerNorm biases, ``A^-1 c``, is half a constant for A near I.

    Args:
        part: The model before the fit.
        layers: The layers to fit by name, first executed first.
    """

    def __init__(self, part: nn.Module, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self.owned = [(name, tensor) for name, tensor in owned_tensors(part, layers) if tensor is not None]
        self.before = [tensor.detach().clone() for _, tensor in self.owned]
        self.after: dict[str, dict[int, Tensor]] = {}

    def note(self, layer: str) -> None:
        """Notes which tensors the fit of a layer changed; to be called after each layer."""
        if layer in self.after:  # another pass, after the first one was undone
            self.after.clear()
        known = {number for changed in self.after.values() for number in changed}
        self.after[layer] = {
            number: tensor.detach().clone()
            for number, (owner, tensor) in enumerate(self.owned)
            if number not in known
            and (owner == layer or owner not in self.layers)  # a norm takes the constant of some layer
            and not torch.equal(tensor, self.before[number])
        }

    @torch.no_grad()
    def apply(self, name: str) -> None:
        """Sets the model to a candidate."""
        fitted = self.names(name)
        for layer, changed in self.after.items():
            for number, after in changed.items():
                before = self.before[number]
                if layer not in fitted:
                    after = before
                elif name == HALF_STRENGTH:
                    after = torch.lerp(before, after, 0.5)
                self.owned[number][1].copy_(after)

    def distinct(self) -> list[str]:
        """Returns the names of the candidates without those that are the same as an earlier one."""
        found: dict[Any, str] = {}
        for name in CANDIDATES:
            changed = frozenset(layer for layer in self.names(name) if self.after.get(layer))
            found.setdefault((changed, bool(changed) and name == HALF_STRENGTH), name)
        return list(found.values())

    def names(self, name: str) -> list[str]:
        """Returns the names of the layers that a candidate has fitted."""
        if name == NOTHING:
            return []
        return list(layers_of(self.layers, 'all' if name == HALF_STRENGTH else name))


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


@dataclass(frozen=True)
class Evidence:
    """What :func:`decide` decides on; ``print`` it for a table.

    Attributes:
        images: Held-out images, in all processes.
        scores: Scores of the candidates.
        distances: Distances of the first layer's features to the training domain, as a multiple of the distances of
            training images; None if these are not known.
    """

    images: int
    scores: Mapping[str, Score]
    distances: Distances | None = None

    @property
    def doubt(self) -> str:
        """What limits the check, as a sentence; empty if nothing does."""
        if self.images >= FEW:
            return ''
        return f'{self.images} held-out images show gross harm at most; give {5 * FEW} images or more'

    def __str__(self) -> str:
        untouched, rows = self.scores[NOTHING], []
        for name, score in self.scores.items():
            change, error = score.change_from(untouched)
            informed, doubt = score.infomax_change_from(untouched)
            row = [name, f'{score.agreement:.1%}', f'{100 * change:+.1f} ± {100 * error:.1f}']
            if untouched.infomax is not None and score.infomax is not None:
                row += [f'{score.infomax:.3f}', f'{informed:+.3f} ± {doubt:.3f}']
            rows.append(tuple('-' if score is untouched and '±' in cell else cell for cell in row))
        titles = 'candidate', 'agreement with mirrored images', 'change', 'infomax', 'change'
        text = format_table(titles[: max(map(len, rows))], rows)
        text += f'\non {self.images} images that were not fitted on'
        if self.distances:
            text += (
                f'; squared distances of the first layer to the training domain, relative to training images: '
                f'lower quartile {self.distances.quartile:.2f}, mean {self.distances.mean:.2f}'
            )
        return text


def decide(scores: Mapping[str, Score], distances: Distances | None = None) -> str:
    """Returns the name of the candidate to keep.

    This is the most complete candidate that nothing speaks against, see :func:`speaks_against`: all layers, the early
    half, the first layer, all layers at half strength, or the untouched model. A fit corrects what its images support
    in any case, so no candidate has to show that it is better.

    Args:
        scores: Scores by candidate, with those of ``'nothing'``, the untouched model; a candidate without one is left
            out.
        distances: See :class:`Evidence`.

    Examples:
        >>> untouched = Score(0.5, images=((1, 1), (0, 1)) * 50)
        >>> worse = Score(0.0, images=((0, 1), (0, 1)) * 50)
        >>> decide({'nothing': untouched, 'first': untouched, 'all': worse})
        'first'
    """
    for name in PREFERENCE:
        if name in scores and not speaks_against(scores[name], scores[NOTHING], distances):
            return name
    return NOTHING


def speaks_against(score: Score, untouched: Score, distances: Distances | None = None) -> str:
    """Returns what speaks against a candidate; empty if nothing does.

    Args:
        score: Score of the candidate.
        untouched: Score of the untouched model.
        distances: See :class:`Evidence`.
    """
    informed, doubt = score.infomax_change_from(untouched)
    if informed > ERRORS * doubt:
        return ''
    if informed < -ERRORS * doubt:
        return 'the predictions say less about the images (infomax), by more than two standard errors'
    if not sum(total for _, total in untouched.images):
        return 'the untouched model finds nothing in the held-out images, so nothing can be compared'
    if is_local_damage(distances):
        return 'the images are damaged in places, as by an occlusion, which a fit spreads over the whole image'
    change, error = score.change_from(untouched)
    if not change >= -ERRORS * error:
        return 'the predictions agree less with those for mirrored images, by more than two standard errors'
    return ''


def is_local_damage(distances: Distances | None) -> bool:
    """Whether most features are those of training images, and some are far from them, as under an occlusion."""
    return (
        distances is not None
        and NEAR[0] <= distances.quartile <= NEAR[1]
        and distances.mean - ERRORS * distances.error > FAR
    )


def explain_nothing(evidence: Evidence) -> str:
    """Returns why nothing is kept, as a sentence."""
    fitted = [score for name, score in evidence.scores.items() if name != NOTHING]
    if not fitted:
        return 'these images support no correction of any layer'
    return speaks_against(fitted[-1], evidence.scores[NOTHING], evidence.distances)


def hold_out(subject: Subject) -> Batches:
    """Takes a fifth of the images of a subject from it, spread over all, and at most :data:`HELD_OUT`.

    Raises:
        CalibrationError: There are two images, or a process has a single one.
    """
    counts = gather_processes(len(subject.images.dataset))
    if min(counts) < 2 or sum(counts) < 3:
        raise CalibrationError(
            'a fit needs three images or more, and two in each process: some to fit to, and others to check it'
        )
    return subject.images.hold_out(max(1, min(-(-HELD_OUT // len(counts)), len(subject.images.dataset) // 5)))


def why_not_comparable(subject: Subject, images: Batches) -> str:
    """Returns why predictions for images and mirrored images can't be compared; empty if they can.

    Args:
        subject: The model.
        images: Some images, of which the first one is looked at.
    """
    packed = next(iter(images.packed()))
    one = {key: value[:1] for key, value in packed.items()}
    kind = type(subject.model).__name__
    if not hasattr(subject.model, 'test_step'):
        return f'{kind} has no test_step'
    try:
        with evaluating(subject.model):
            (sample,), (other,) = predict(subject.model, one), predict(subject.model, one, mirror=True)
        if not any(hasattr(sample, name) for name in TALLIES):
            return f'the predictions of {kind} have none of {", ".join(TALLIES)}'
        tally(sample, other)
    except Exception as error:  # a model may need more than images
        if is_from_user(error):
            raise
        return f'the predictions of {kind} for an image and its mirrored image fail ({type(error).__name__}: {error})'
    return ''


def gather_evidence(
    subject: Subject,
    candidates: Candidates,
    images: Batches,
    source: Mapping[str, Moments],
    training: Distances | None = None,
) -> Evidence:
    """Evaluates all candidates; leaves the model at any of these.

    Args:
        subject: The fitted model.
        candidates: The candidates of the fit.
        images: Held-out images of this process.
        source: Moments in the training domain by layer name.
        training: Distances of the training images.
    """
    tallies = {name: Tally() for name in candidates.distinct()}
    with evaluating(subject.model), tqdm(total=len(images.dataset), unit='image', disable=get_rank() != 0) as bar:
        for packed in images.packed():
            for name, own in tallies.items():
                candidates.apply(name)
                mirrored = predict(subject.model, packed, mirror=True)
                for pair in zip(predict(subject.model, packed), mirrored, strict=True):
                    own.add(tally(*pair))
            bar.update(len(packed['inputs']))
    for name, own in tallies.items():
        tallies[name] = Tally()
        for part in gather_processes(own):
            tallies[name].add(part)
    distances = None
    if training:
        candidates.apply(NOTHING)
        distances = measure_distances(subject.part, subject.layers, images, source).relative_to(training)
    return Evidence(tallies[NOTHING].images, {name: own.score() for name, own in tallies.items()}, distances)


def keep(subject: Subject, candidates: Candidates, name: str, report: CalibrationReport) -> CalibrationReport:
    """Sets a model to a candidate, notes it in ``subject.meta``, and returns the rows of the report that belong to it.

    Args:
        subject: The fitted model.
        candidates: The candidates of the fit.
        name: The candidate; not ``'nothing'``.
        report: Report of the fit of all layers.

    Raises:
        CalibrationError: The fit has changed none of the candidate's layers.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> source, about = gather_source(open_subject(cfg, 'vit.pth', split='train', device='cpu'))
        >>> subject = open_subject(cfg, 'vit.pth', split='test', device='cpu')
        >>> assert not why_not_comparable(subject, subject.images)
        >>> held = hold_out(subject)
        >>> candidates = Candidates(subject.part, subject.layers)
        >>> report, strides = fit(subject, source, progress=candidates.note)
        >>> evidence = gather_evidence(subject, candidates, held, source, Distances.read(about))
        >>> name = decide(evidence.scores, evidence.distances)
        >>> if name != 'nothing':
        ...     report = keep(subject, candidates, name, report)
        ...     torch.save(dict(meta=subject.meta, state_dict=subject.model.state_dict()), 'fitted.pth')
    """
    fitted = set(candidates.names(name))
    if not any(candidates.after.get(layer) for layer in fitted):
        skipped = [f'{layer}: {why}' for layer, why in report.skipped.items() if layer in fitted]
        reason = skipped[0] if skipped else 'these images support no correction'
        raise CalibrationError(f'the fit of {name!r} changes nothing ({reason}); the original checkpoint is that model')
    rows = [row for row in report.layers if row.name in fitted]
    if name == HALF_STRENGTH:  # maps and spectra are those of the whole fit
        rows = [replace(row, moved=row.moved / 4, support=row.support and row.support.scaled(0.5)) for row in rows]
    skipped = {layer: why for layer, why in report.skipped.items() if layer in fitted}
    report = make_report(report.mode, report.images, rows, skipped)
    candidates.apply(name)
    changed = sum(bool(candidates.after.get(layer)) for layer in fitted)
    subject.meta[STAMP] |= dict(layers=changed, part=name)
    return report


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

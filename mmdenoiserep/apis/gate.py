"""Chooses how much of a domain fit to keep, without labels.

A fit of all layers gives several candidates: the untouched model, the fit of the first layer, of the early half, of all
layers, and all layers at half strength. Images that were not fitted on show how well the predictions of each candidate
agree with those for the mirrored images. :func:`decide` keeps as much of the fit as this does not speak against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

from mmengine.dist import get_rank
from tqdm import tqdm

from ..core import CalibrationError, CalibrationReport, Moments, evaluating
from ..core.calibration.moments import gather_processes
from ..core.calibration.report import make_report
from ..core.files.fused import STAMP
from ..core.utils.table import format_table
from .agreement import TALLIES, Score, Tally, predict, tally
from .calibration import Subject
from .candidates import HALF_STRENGTH, NOTHING, Candidates
from .distances import Distances, measure_distances
from .errors import is_from_user
from .images import Batches

PREFERENCE = 'all', 'early', 'first', HALF_STRENGTH
"""The candidates, most complete first; half strength corrects no layer wholly."""
ERRORS = 2
"""Standard errors by which agreement and infomax may be lower than those of the untouched model."""
FEW = 10
"""Fewer held-out images show nothing but gross harm."""
HELD_OUT = 200
"""Largest number of images that are kept from the fit."""
DAMAGE = 1.3
"""Local damage: least ratio of mean and lower quartile of the distances, divided by the same ratio in training.

Measured on detection, segmentation and re-identification with 32 to 1,000 images: 1.33 to 6.30 under an occlusion, at
most 1.18 in the 180 other cases, over three seeds. The number was chosen on two of them.
"""


@dataclass(frozen=True)
class Evidence:
    """What :func:`decide` decides on; ``print`` it for a table.

    Attributes:
        images: Held-out images, in all processes.
        scores: Scores of the candidates.
        distances: Distances of the first layer's features to the training domain, as a multiple of the distances of
            training images; of held-out images and some of the others, as the untouched model sees them. None if those
            of training images are not known.
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
                f'; squared distances of the first layer to the training domain, on these and fitted images, relative '
                f'to training images: lower quartile {self.distances.quartile:.2f}, mean {self.distances.mean:.2f}'
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
    """Whether some features are much farther from the training domain than most are, as under an occlusion."""
    return distances is not None and distances.mean > DAMAGE * distances.quartile


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
    twins = candidates.twins()
    tallies = {name: Tally() for name in dict.fromkeys(twins.values())}
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
        both = chain(images, subject.some_images())
        distances = measure_distances(subject.part, subject.layers, both, source).relative_to(training)
    scores = {name: own.score() for name, own in tallies.items()}
    changed = {name: scores[twin] for name, twin in twins.items() if twin != NOTHING}
    return Evidence(tallies[NOTHING].images, {NOTHING: scores[NOTHING]} | changed, distances)


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

"""The page of the study: tables of the results and conclusions."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from mmdenoiserep.core import InputError

STAGES = 'baseline', 'control', 'denoised', 'fused', 'label-free-fused'
"""The evaluated models of an experiment, in the order of the runs."""
MARKERS = '<!-- results: begin -->', '<!-- results: end -->'


@dataclass(frozen=True)
class Result:
    """Results of one experiment over its seeds.

    Attributes:
        title: Name of the model.
        data: Name of the data set.
        images: Number of training images.
        seeds: Seeds, in the order of all other lists.
        iterations: Number of iterations of the baseline, and of each fine-tuning.
        metrics: Values in percent, one for each seed, by metric and stage.
        steps: Rounding step of each metric in the log, in percent.
        losses: First and last logged ``loss_denoise / weight`` of the joint training, one pair for each seed.
        label_free_losses: First and last logged ``loss_denoise`` of the label-free training, which has no weight.
    """

    title: str
    data: str
    images: int
    seeds: list[int]
    iterations: tuple[int, int]
    metrics: dict[str, dict[str, list[float]]]
    steps: dict[str, float]
    losses: list[tuple[float, float]]
    label_free_losses: list[tuple[float, float]]


class Paired:
    """Paired differences of two stages with the same seeds, data and iterations.

    Args:
        after: Values of one stage, one for each seed.
        before: Values of the other stage, in the same order.
        step: Rounding step of the values. Their deviation counts as at least ``step / sqrt(6)``, the deviation of the
            rounding, since differences of rounded values may be equal by chance.

    Attributes:
        differences: One for each seed.
        mean: Mean of the differences.
        margin: Half of the 95 % confidence interval of the mean by Student's t; infinite for one seed.
    """

    def __init__(self, after: list[float], before: list[float], step: float = 0.0) -> None:
        from scipy.stats import t

        self.differences = [a - b for a, b in zip(after, before, strict=True)]
        self.mean = statistics.mean(self.differences)
        count = len(self.differences)
        self.margin = math.inf
        if count > 1:
            deviation = max(statistics.stdev(self.differences), step / math.sqrt(6))
            self.margin = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)

    @property
    def interval(self) -> str:
        """The 95 % confidence interval."""
        return f'{self.mean - self.margin:+.2f} to {self.mean + self.margin:+.2f}'

    @property
    def verdict(self) -> str:
        """The direction of the effect, if the interval excludes zero."""
        if abs(self.mean) <= self.margin:
            return 'no effect within noise'
        return 'higher' if self.mean > 0 else 'lower'


def spread(values: list[float], form: str = '.2f') -> str:
    """Formats mean and sample standard deviation."""
    mean = format(statistics.mean(values), form)
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def table(header: list[str], rows: list[list]) -> str:
    """Formats a table in Markdown."""
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in (header, ['---'] * len(header), *rows))


def report(results: list[Result], note: dict) -> str:
    """Returns the generated part of the page, in Markdown.

    Args:
        results: Results of the experiments.
        note: Content of the file of :func:`studies.study.write_note`.
    """
    accuracy, label_free, training, effects, label_free_effects = [], [], [], {}, {}
    for result in results:
        for metric, values in result.metrics.items():
            free = Paired(values['label-free-fused'], values['baseline'], result.steps[metric])
            label_free_effects[f'{metric} of {result.title}'] = free
            label_free.append(
                [result.title, metric, spread(values['baseline']), spread(values['label-free-fused'])]
                + [spread(free.differences, '+.2f'), free.interval, free.verdict]
            )
            extra = Paired(values['control'], values['baseline'])
            effect = Paired(values['fused'], values['control'], result.steps[metric])
            effects[f'{metric} of {result.title}'] = effect
            accuracy.append(
                [result.title, metric]
                + [spread(values[stage]) for stage in ('baseline', 'control', 'fused')]
                + [spread(pair.differences, '+.2f') for pair in (extra, effect)]
                + [effect.interval, effect.verdict]
            )
        unfused = [Paired(values['fused'], values['denoised']).differences for values in result.metrics.values()]
        training.append(
            [result.title, result.data, f'{result.images:,}']
            + [f'{result.iterations[0]} + {result.iterations[1]}', ', '.join(map(str, result.seeds))]
            + [
                first_to_last(result.losses),
                first_to_last(result.label_free_losses),
                f'{max(map(abs, sum(unfused, []))):.2f}',
            ]
        )
    columns = ['model', 'metric, %', 'baseline', 'control', 'denoised, fused', 'control - baseline', 'fused - control']
    about = ['model', 'data', 'training images', 'iterations', 'seeds', '`loss_denoise / weight`']
    header = ['model', 'metric, %', 'baseline', 'label-free, fused', 'label-free - baseline', '95 % interval of it']
    versions = ', '.join(f'{name} {number}' for name, number in note['versions'].items())
    return '\n\n'.join(
        [
            table([*columns, '95 % interval of it', 'denoising'], accuracy),
            conclusion(effects, 'control'),
            table([*header, 'denoising'], label_free),
            conclusion(label_free_effects, 'baseline'),
            table([*about, 'label-free `loss_denoise`', 'fused - unfused'], training),
            f'{note["cores"]} CPU cores, {note["jobs"]} processes at a time, one thread each: '
            f'{note["cpu_seconds"] / 60:.0f} minutes of CPU time in {note["seconds"] / 60:.0f} minutes, by '
            f'`{note["command"]}`. {versions}.',
        ]
    )


def first_to_last(losses: list[tuple[float, float]]) -> str:
    """Formats the means of the first and of the last losses."""
    return ' to '.join(f'{statistics.mean(values):.3f}' for values in zip(*losses, strict=True))


def conclusion(effects: dict[str, Paired], control: str) -> str:
    """Returns sentences about the paired differences of denoising and its control."""
    sentences = []
    for verdict, text in {
        'no effect within noise': 'the 95 % interval of the paired difference contains zero: no effect within noise',
        'higher': f'denoising is above the {control} by more than the noise of the seeds',
        'lower': f'denoising is below the {control} by more than the noise of the seeds',
    }.items():
        found = {name: effect.mean for name, effect in effects.items() if effect.verdict == verdict}
        if found:
            which = ', '.join(f'{name} {mean:+.2f}' for name, mean in found.items())
            sentences.append(f'In {len(found)} of {len(effects)} rows {text} ({which}).')
    return ' '.join(sentences)


def write_page(path: Path, text: str) -> None:
    """Replaces the text between the markers of a page."""
    page = path.read_text(encoding='utf-8') if path.exists() else ''
    begin, end = (page.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise InputError(f'{path} needs the lines {MARKERS[0]} and {MARKERS[1]}, between which the results go')
    path.write_text(f'{page[: begin + len(MARKERS[0])]}\n\n{text}\n\n{page[end:]}', encoding='utf-8')

"""The page of the robustness study: tables of the results, conclusions and a picture."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.study_report import Paired, spread, table

AS_TRAINED, ALL_LAYERS, EARLY_HALF, FIRST_LAYER = 'as trained', 'all layers', 'early half', 'first layer'
BATCH_NORM, FILTER, LABELLED = 'BatchNorm', 'filter, chosen', 'fine-tuned with labels'
HALF_STRENGTH, CHECK = 'half strength', 'what the check writes'
CANDIDATE_NAMES = dict(first=FIRST_LAYER, early=EARLY_HALF, all=ALL_LAYERS) | {'half-strength': HALF_STRENGTH}
"""Names of the methods by candidate of a fit, but for the untouched model."""
DRAWN = CHECK, FIRST_LAYER, ALL_LAYERS, EARLY_HALF, FILTER, LABELLED, BATCH_NORM, 'block alignment'
"""The methods in the picture, in the order of their colours, the same in every panel."""
LATENCY = 0.02
"""Largest deviation of the median ratio of latencies from 1."""


@dataclass(frozen=True)
class Result:
    """Results of one experiment over its seeds.

    Attributes:
        name: Name of the experiment.
        title: Name of the model.
        data: Name of the data set.
        seeds: Seeds, in the order of the runs.
        steps: Rounding step of each metric in percent (0 without rounding).
        runs: Results of ``studies.robustness_run.RobustnessRun.measure``, one for each seed.
    """

    name: str
    title: str
    data: str
    seeds: list[int]
    steps: dict[str, float]
    runs: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """The first metric."""
        return next(iter(self.steps))

    @property
    def counts(self) -> dict[int, tuple[str, ...]]:
        """The keys of the scores by number of images to fit on."""
        run = self.runs[0]
        return {int(count): ('counts', count) for count in run['counts']} | {run['images']['target']: ('table',)}

    def values(self, *keys: str, metric: str | None = None) -> list[float]:
        """Returns one number for each seed, by the keys of nested dicts and a metric (the first one by default)."""
        values = []
        for run in self.runs:
            for key in (*keys, metric or self.metric):
                run = run[key]  # type: ignore[assignment]
            values.append(run)
        return values  # type: ignore[return-value]

    def gain(self, corruption: str, *keys: str, metric: str | None = None) -> Paired:
        """Returns a score on a corruption minus the score of the model as trained; a single key is a method."""
        metric = metric or self.metric
        keys = ('table', corruption, *keys) if len(keys) == 1 else keys
        before = self.values('table', corruption, AS_TRAINED, metric=metric)
        return Paired(self.values(*keys, metric=metric), before, self.steps[metric])


@dataclass(frozen=True)
class Goal:
    """A goal of the study.

    Attributes:
        text: Description of the goal.
        measured: The result in words.
        met: Whether the goal is met.
    """

    text: str
    measured: str
    met: bool


def report(results: list[Result], note: dict, severities: dict[str, dict[str, float]]) -> str:
    """Returns the generated part of the page, in Markdown.

    Args:
        results: Results of the experiments.
        note: Content of the file of :func:`studies.study.write_note`.
        severities: Severities by data set and corruption.
    """
    parts = [
        '### Goals',
        'Set before anything was measured.',
        goals_table(results),
        '### What helps, and what does not',
        tally(results),
        '### The check',
        check_table(results),
    ]
    parts += ['### Corruptions', severity_table(results, severities)]
    for result in results:
        parts += [f'### {result.title}', *scores(result), counts(result)]
        if 'elsewhere' in result.runs[0]:
            parts.append(elsewhere(result))
    versions = ', '.join(f'{name} {number}' for name, number in note['versions'].items())
    parts.append(
        f'{note["cores"]} CPU cores, {note["jobs"]} processes at a time, one thread each: '
        f'{note["cpu_seconds"] / 60:.0f} minutes of CPU time in {note["seconds"] / 60:.0f} minutes, by '
        f'`{note["command"]}`. {versions}.'
    )
    return '\n\n'.join(parts)


def goals(results: list[Result]) -> list[Goal]:
    """Returns the goals of the experiments that were run."""
    by_name = {result.name: result for result in results}
    found = []
    for corruption, least in {'noise': {'vit': 20, 'resnet': 30}, 'blur': {'vit': 8, 'resnet': 8}}.items():
        for name, points in least.items():
            if result := by_name.get(name):
                gain = result.gain(corruption, ALL_LAYERS)
                text = f'{corruption}, {result.title}: at least +{points} {result.metric}'
                found.append(Goal(text, spread(gain.differences, '+.2f'), gain.mean >= points))
    for name in ('mask-rcnn', 'segformer', 'reid'):
        for corruption in ('noise', 'blur'):
            if result := by_name.get(name):
                shares = recovered(result, corruption)
                text = f'{corruption}, {result.title}: at least 60 % of the lost {result.metric} recovered'
                found.append(Goal(text, f'{spread(shares, ".1f")} %', statistics.mean(shares) >= 60))
            if result and name != 'segformer':
                labels, least = result.gain(corruption, LABELLED), 75 if name == 'mask-rcnn' else 60
                pairs = zip(result.gain(corruption, ALL_LAYERS).differences, labels.differences, strict=True)
                shares = [100 * ours / theirs if theirs else 0.0 for ours, theirs in pairs]
                text = f'{corruption}, {result.title}: at least {least} % of what labels gain'
                found.append(Goal(text, f'{spread(shares, ".1f")} %', statistics.mean(shares) >= least))
    if (result := by_name.get('vit')) and 'skewed' in result.runs[0]:
        noise, clean = (result.gain(c, 'skewed', 'scores', c, ALL_LAYERS) for c in ('noise', 'clean'))
        text = f'4 of 10 classes, {result.title}: at least +15 on noise, clean within 1'
        measured = f'{spread(noise.differences, "+.2f")}, clean {spread(clean.differences, "+.2f")}'
        found.append(Goal(text, measured, noise.mean >= 15 and abs(clean.mean) <= 1))
    cells = list(cells_of(results))
    harm, worst, regret = judge(cells, CHECK)
    found.append(Goal('the check: harm in at most 3 % of the cases', f'{harm:.1f} %', harm <= 3))
    found.append(Goal('the check: harm of at most 2', f'{worst:+.2f} at worst', worst >= -2))
    found.append(Goal('the check: mean regret of at most 1.5', f'{regret:.2f}', regret <= 1.5))
    lowest = min(cell.gains[CHECK] for cell in cells if cell.corruption == 'clean')
    found.append(Goal('the check: clean images lose at most 0.3', f'{lowest:+.2f} at worst', lowest >= -0.3))
    costs = {result.title: result.gain('clean', ALL_LAYERS).mean for result in results}
    worst = min(costs, key=lambda title: costs[title])
    text = 'fitted to clean images: every model within 0.5 on them'
    found.append(Goal(text, f'{costs[worst]:+.2f} at worst ({worst})', costs[worst] >= -0.5))
    ratios = {result.title: statistics.mean(run['latency'] for run in result.runs) for result in results}
    worst = max(ratios, key=lambda title: abs(ratios[title] - 1))
    text = f'latency, fused over baseline: every model within {LATENCY} of 1.00'
    found.append(Goal(text, f'{ratios[worst]:.3f} at worst ({worst})', abs(ratios[worst] - 1) <= LATENCY))
    if result := by_name.get('resnet'):
        leads = {
            corruption: Paired(
                result.values('table', corruption, ALL_LAYERS), result.values('table', corruption, BATCH_NORM)
            ).mean
            for corruption in result.runs[0]['table']
        }
        worst = min(leads, key=lambda corruption: leads[corruption])
        text = f'{result.title}: at least re-estimated BatchNorm in every column'
        found.append(Goal(text, f'{leads[worst]:+.2f} at worst ({worst})', leads[worst] >= 0))
    return found


@dataclass(frozen=True)
class Cell:
    """A fit: a model, a seed, some images and their corruption.

    Attributes:
        model: Title of the model.
        corruption: The corruption.
        images: Number of images, as in :func:`counts`.
        gains: Points over the untouched model by candidate and of the check, in the first metric.
        harm: Loss that counts as harm, points.
    """

    model: str
    corruption: str
    images: str
    gains: dict[str, float]
    harm: float


def cells_of(results: list[Result]) -> Iterator[Cell]:
    """Yields every fit of every seed."""
    for result in results:
        harm = 0.7 if result.name == 'mask-rcnn' else 0.5
        for run in result.runs:
            places = {str(run['images']['target']): run['table']} | run['counts']
            if skewed := run.get('skewed'):
                places[f'{skewed["images"]}, skewed'] = skewed['scores']
            for images, corruptions in places.items():
                for corruption, scores in corruptions.items():
                    before = run['table'][corruption][AS_TRAINED][result.metric]
                    methods = (*CANDIDATE_NAMES.values(), CHECK)
                    gains = {method: scores[method][result.metric] - before for method in methods}
                    yield Cell(result.title, corruption, images, gains, harm)


def judge(cells: list[Cell], method: str) -> tuple[float, float, float]:
    """Returns the percentage of cells with harm, the lowest gain, and the mean regret against the best candidate."""
    gains = [cell.gains[method] for cell in cells]
    regrets = [max(0.0, *cell.gains.values()) - cell.gains[method] for cell in cells]
    harmed = sum(gain < -cell.harm for gain, cell in zip(gains, cells, strict=True))
    return 100 * harmed / len(cells), min(gains), statistics.mean(regrets)


def check_table(results: list[Result]) -> str:
    """Returns how the check and each fixed choice fare over all fits."""
    cells = list(cells_of(results))
    rows = []
    for method in (CHECK, *CANDIDATE_NAMES.values()):
        harm, worst, regret = judge(cells, method)
        place = min(cells, key=lambda cell: cell.gains[method])
        where = f'{place.model}, {place.corruption}, {place.images} images'
        rows.append([method, f'{harm:.1f} %', f'{worst:+.1f} ({where})', f'{regret:.2f}'])
    regret = statistics.mean(max(0.0, *cell.gains.values()) for cell in cells)
    rows.append(['nothing', '0.0 %', '0.0', f'{regret:.2f}'])
    text = (
        f'{len(cells)} fits, of every model, seed, corruption and number of images. Harm is a loss of more than 0.5 '
        'points (detection: 0.7 box AP); regret is the distance to the best candidate of that fit.'
    )
    return f'{text}\n\n{table(["choice", "harmed", "worst", "mean regret"], rows)}'


def recovered(result: Result, corruption: str) -> list[float]:
    """Returns the percentage of a corruption's loss that the fit of all layers recovers, one for each seed."""
    clean, before, after = (
        result.values('table', *keys)
        for keys in (('clean', AS_TRAINED), (corruption, AS_TRAINED), (corruption, ALL_LAYERS))
    )
    return [100 * (a - b) / (c - b) if c != b else 0.0 for a, b, c in zip(after, before, clean, strict=True)]


def goals_table(results: list[Result]) -> str:
    """Returns the table of goals, and how many are met."""
    judged = goals(results)
    rows = [[goal.text, goal.measured, 'met' if goal.met else '**missed**'] for goal in judged]
    met = sum(goal.met for goal in judged)
    text = 'The fit is the one of all layers.'
    return f'{table(["goal", "measured", ""], rows)}\n\n{met} of {len(judged)} goals are met. {text}'


def tally(results: list[Result]) -> str:
    """Returns for each method the number of columns in which its effect exceeds the noise of the seeds."""
    effects: dict[str, dict[str, Paired]] = {}
    for result in results:
        for corruption, methods in result.runs[0]['table'].items():
            for method in methods:
                if method != AS_TRAINED:
                    place = f'{result.title}, {corruption}'
                    effects.setdefault(method, {})[place] = result.gain(corruption, method)
    rows, sentences = [], []
    for method, places in effects.items():
        verdicts = [effect.verdict for effect in places.values()]
        best, worst = (pick(places, key=lambda place: places[place].mean) for pick in (max, min))
        counted = [verdicts.count(verdict) for verdict in ('higher', 'no effect within noise', 'lower')]
        ends = [f'{places[place].mean:+.2f} ({place})' for place in (best, worst)]
        rows.append([method, len(places), *counted, *ends])
        if not counted[0]:
            sentences.append(f'**{method}** helps nowhere by more than the noise of the seeds.')
        elif counted[2] >= counted[0]:
            sentences.append(f'**{method}** harms in at least as many columns as it helps.')
    if any(len(result.seeds) == 1 for result in results):
        sentences = ['One seed alone says nothing about the noise of the seeds.']
    header = ['method', 'columns', 'higher', 'no effect within noise', 'lower', 'best', 'worst']
    return '\n\n'.join([table(header, rows), *([' '.join(sentences)] if sentences else [])])


def severity_table(results: list[Result], severities: dict[str, dict[str, float]]) -> str:
    """Returns the table of severities by data set and corruption."""
    data = [name for name in severities if any(result.data == name for result in results)]
    corruptions = list(dict.fromkeys(corruption for name in data for corruption in severities[name]))
    rows = [
        [name, *(f'{severities[name][c]:.3g}' if c in severities[name] else '-' for c in corruptions)] for name in data
    ]
    return table(['data', *corruptions], rows)


def scores(result: Result) -> list[str]:
    """Returns a table of the gains for each metric, and one of what every method recovers."""
    columns = list(result.runs[0]['table'])
    methods = [method for method in result.runs[0]['table']['clean'] if method != AS_TRAINED]
    images = result.runs[0]['images']
    tables = [
        f'{images["source"]:,} clean training images for the source, {images["target"]:,} others to fit on, '
        f'{images["test"]:,} test images; seeds {", ".join(map(str, result.seeds))}. '
        f'Latency, fused over baseline: {spread([run["latency"] for run in result.runs], ".3f")}.'
    ]
    for metric in result.steps:
        rows = [[AS_TRAINED, *(spread(result.values('table', c, AS_TRAINED, metric=metric), '.1f') for c in columns)]]
        for method in methods:
            gains = [result.gain(column, method, metric=metric).differences for column in columns]
            rows.append([method, *(spread(gain, '+.2f') for gain in gains)])
        tables.append(table([f'{metric}, %', *columns], rows))
    chosen = [', '.join(dict.fromkeys(run['filters'][column] for run in result.runs)) for column in columns]
    tables.append(table(['filter', *columns], [['chosen', *chosen]]))
    rows = [[method, *(shares(result, column, method) for column in columns[1:])] for method in methods]
    tables.append(table([f'{result.metric} recovered, % of loss / of labels', *columns[1:]], rows))
    return tables


def shares(result: Result, corruption: str, method: str) -> str:
    """Returns a mean gain in percent of the mean loss by a corruption, and of the gain with labels; - below a point."""
    clean, before = (statistics.mean(result.values('table', c, AS_TRAINED)) for c in ('clean', corruption))
    wholes = clean - before, result.gain(corruption, LABELLED).mean
    gain = result.gain(corruption, method).mean
    return ' / '.join(str(round(100 * gain / whole)) if whole >= 1 else '-' for whole in wholes)


def counts(result: Result) -> str:
    """Returns the gain on noise and the change on clean images by number of images, and for a skewed target."""
    methods = CHECK, *CANDIDATE_NAMES.values()
    places: dict[Any, tuple[str, ...]] = dict(result.counts)
    if skewed := result.runs[0].get('skewed'):
        places[f'{skewed["images"]}, skewed'] = ('skewed', 'scores')
    rows = [
        [label]
        + [
            ' / '.join(spread(result.gain(c, *keys, c, method).differences, '+.1f') for c in ('noise', 'clean'))
            for method in methods
        ]
        for label, keys in places.items()
    ]
    return table(['images to fit on (gain on noise / change on clean)', *methods], rows)


def elsewhere(result: Result) -> str:
    """Returns the gains of fits to one domain in other domains."""
    found = result.runs[0]['elsewhere']
    methods = list(CANDIDATE_NAMES.values())
    rows = [
        [fitted, corruption]
        + [spread(result.gain(corruption, 'elsewhere', fitted, corruption, m).differences, '+.1f') for m in methods]
        for fitted, evaluated in found.items()
        for corruption in evaluated
    ]
    return table(['fitted to', 'evaluated on', *methods], rows)


def draw(results: list[Result], path: Path) -> None:
    """Writes the picture: gains by corruption and method, and by the number of images to fit on."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    panels: list[tuple[Callable, Result]] = [
        (panel, result) for panel in (draw_bars, draw_curves) for result in results
    ]
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), layout='constrained', squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis('off')
    for place, (panel, result) in zip(axes.flat, panels, strict=False):
        panel(place, result)
    handles = {label: bar for place in axes.flat for bar, label in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=len(DRAWN))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def colour(method: str) -> tuple:
    """Returns the colour of a method."""
    import matplotlib

    return matplotlib.colormaps['tab10'](DRAWN.index(method))


def draw_bars(axes: Any, result: Result) -> None:
    """Draws the gain of most of :data:`DRAWN` in the first metric by corruption."""
    found = result.runs[0]['table']
    methods = [method for method in DRAWN if method in found['clean'] and method not in (ALL_LAYERS, EARLY_HALF)]
    width = 0.85 / len(methods)
    for i, method in enumerate(methods):
        gains = [result.gain(corruption, method).differences for corruption in found]
        deviations = [statistics.stdev(gain) if len(gain) > 1 else 0 for gain in gains]
        places = [x + (i - (len(methods) - 1) / 2) * width for x in range(len(found))]
        bars = dict(width=width, yerr=deviations, error_kw=dict(lw=0.6), label=method, color=colour(method))
        axes.bar(places, [statistics.mean(gain) for gain in gains], **bars)
    axes.axhline(0, color='black', lw=0.6)
    axes.set_xticks(range(len(found)), list(found), rotation=20)
    axes.set(title=result.title, ylabel=f'{result.metric}, against as trained')


def draw_curves(axes: Any, result: Result) -> None:
    """Draws gain on noise (solid) and change on clean (dashed) over the number of images to fit on."""
    found = result.counts
    for method in (ALL_LAYERS, EARLY_HALF, FIRST_LAYER):
        for corruption, style in {'noise': '-', 'clean': '--'}.items():
            gains = [result.gain(corruption, *keys, corruption, method).mean for keys in found.values()]
            label = method if corruption == 'noise' else None
            axes.plot(list(found), gains, style, color=colour(method), marker='.', label=label)
    axes.axhline(0, color='black', lw=0.6)
    axes.set_xscale('log')
    axes.set(title=f'{result.title}: noise (solid), clean (dashed)', xlabel='images to fit on', ylabel=result.metric)

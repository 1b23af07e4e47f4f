"""The page of the study on real weights."""

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mmdenoiserep.apis.candidates import NOTHING
from studies.real_weights.measure import CHECK, TEST
from studies.study_report import table

ROWS = {
    NOTHING: 'as trained',
    'filter, blind': 'filter, blind',
    'filter, chosen': 'filter, chosen',
    'BatchNorm': 'BatchNorm',
    'first': 'first layer',
    'early': 'early half',
    'all': 'all layers',
    'half-strength': 'half strength',
    CHECK: 'what the check writes',
}
"""Names of the rows by method."""
RESAMPLES = 4000


def interval(differences: list[int]) -> tuple[float, float, float]:
    """Returns the mean of paired differences and its 95 % interval, in percent.

    The interval is the bootstrap's: photographs are drawn with replacement, each with all of its crops.

    Args:
        differences: Those of the crops of one photograph side by side.
    """
    values = torch.tensor(differences, dtype=torch.float64).view(-1, TEST).mean(1)  # (photographs,)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = _quantiles(values[chosen].mean(1))
    return 100 * values.mean().item(), 100 * low, 100 * high


def _quantiles(values: Tensor) -> tuple[float, float]:
    return values.quantile(0.025).item(), values.quantile(0.975).item()


def differences(scores: dict[str, dict], method: str, metric: str) -> list[int]:
    """Returns what a method changes for each crop: -1, 0 or 1."""
    return [after - before for after, before in zip(scores[method][metric], scores[NOTHING][metric], strict=True)]


def cell(scores: dict[str, dict], method: str, metric: str) -> str:
    """Returns a value in percent, of the model as trained, or a gain over it with its interval."""
    if method == NOTHING:
        return f'{100 * mean(scores[NOTHING][metric]):.1f}'
    return '{:+.1f} ({:+.0f} to {:+.0f})'.format(*interval(differences(scores, method, metric)))


def scores_table(results: dict[str, dict[str, Any]], metric: str) -> str:
    """Returns the table of a metric of one model and number of crops, with the results by corruption."""
    first = next(iter(results.values()))['scores']
    rows = [
        [title, *(cell(result['scores'], method, metric) for result in results.values())]
        for method, title in ROWS.items()
        if method in first
    ]
    rows.append(
        ['all layers, then on clean crops', *(f'{100 * mean(r["back"][metric]):.1f}' for r in results.values())]
    )
    return table([f'{metric}, %', *results], rows)


def choices_table(results: dict[str, dict[str, Any]]) -> str:
    """Returns what was chosen for each corruption."""
    rows = [
        ['filter, chosen', *(result['filter'] for result in results.values())],
        ['the check', *(result['check'] for result in results.values())],
    ]
    return table(['chosen', *results], rows)


def goals_table(results: dict[tuple[str, int], dict[str, dict[str, Any]]]) -> str:
    """Returns the goals that were set beforehand, with what was measured."""
    rows = []
    for (name, count), corruptions in results.items():
        title = f'{name}, {count} crops'
        clean = corruptions['clean']['scores']
        for metric, least in (('retrieval', 99), ('agreement', 95)):
            if metric in clean['all']:
                value = 100 * mean(clean['all'][metric])
                rows.append(
                    [f'{title}, fitted to clean: {metric} at least {least} %', f'{value:.1f} %', value >= least]
                )
        metric = list(clean['all'])[-1]
        spans = {c: interval(differences(r['scores'], 'all', metric)) for c, r in corruptions.items() if c != 'clean'}
        worst = min(spans, key=lambda c: spans[c][2])
        text = '{}: {:+.1f} ({:+.0f} to {:+.0f})'.format(worst, *spans[worst])
        rows.append([f'{title}: {metric} nowhere worse by more than the interval', text, spans[worst][2] >= 0])
        for c in ('noise', 'shot', 'blur'):
            firsts = 100 * mean(differences(corruptions[c]['scores'], 'first', metric))
            text = f'{spans[c][0]:+.1f}, first {firsts:+.1f}'
            rows.append([f'{title}, {c}: {metric} at least as with the first layer', text, spans[c][0] >= firsts])
    met = sum(row[-1] for row in rows)
    lines = [[goal, measured, 'met' if reached else '**missed**'] for goal, measured, reached in rows]
    return f'{table(["goal", "all layers", ""], lines)}\n\n{met} of {len(rows)} goals are met.'


def report(results: dict[tuple[str, int], dict[str, dict[str, Any]]], note: str) -> str:
    """Returns the text of all results.

    Args:
        results: By model and number of crops, then by corruption, of ``RealWeights.measure``.
        note: Sentence about the run.
    """
    parts = ['### Goals', goals_table(results)]
    for (name, count), corruptions in results.items():
        parts.append(f'### {name}, {count} crops to fit to')
        first = next(iter(corruptions.values()))['scores']['all']
        parts += [scores_table(corruptions, metric) for metric in reversed(first)]
        parts.append(choices_table(corruptions))
    return '\n\n'.join([*parts, note])

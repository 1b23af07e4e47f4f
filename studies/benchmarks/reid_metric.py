"""The re-identification metric against a loop over the queries.

Random features with identities and cameras as in Market-1501. The loop is the usual implementation, such as
torchreid's, in NumPy: compute and sort all distances, then process one query after the other.
"""

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARKET = (3368, 15913, 384)
MSMT17 = (11659, 82161, 384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        '--size',
        type=int,
        nargs=3,
        default=MARKET,
        metavar=('QUERIES', 'GALLERY', 'CHANNELS'),
        help=f'size to compare both at (default: {" ".join(map(str, MARKET))}, Market-1501)',
    )
    parser.add_argument('--repeats', type=int, default=3, help='timed runs of each (default: %(default)s)')
    parser.add_argument('--msmt17', action='store_true', help='also measure ours at the size of MSMT17; takes minutes')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures by size and implementation under ``rows``.

    Raises:
        ValueError: The two implementations disagree.
        RuntimeError: The system does not report the memory.
    """
    rows = measure(args.size, args.repeats)
    if args.msmt17:
        rows += measure(MSMT17, 1, loops=False)
    lines = [
        '| queries x gallery x channels | way | seconds | peak memory | mAP | rank-1 |',
        '|---|---|---|---|---|---|',
    ]
    for row in rows:
        size = ' x '.join(f'{number:,}' for number in row['size'])
        mean_precision, rank1 = (f'{100 * row["results"][name]:.2f}' for name in ('mAP', 'rank1'))
        seconds, peak = f'{median(row["seconds"]):.1f}', f'{row["peak_mib"]:,.0f} MiB'
        lines.append(f'| {size} | {row["way"]} | {seconds} | {peak} | {mean_precision} | {rank1} |')
    note = (
        'Seconds: medians of alternating runs. Peak memory: growth of a process in one run, without the libraries and '
        'the features.'
    )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def measure(size: Sequence[int], repeats: int, loops: bool = True) -> list[dict[str, Any]]:
    """Returns for each implementation ``way``, ``size``, ``seconds`` of all runs, ``peak_mib`` and ``results``.

    Args:
        size: Numbers of queries, gallery images and channels.
        repeats: Runs of each.
        loops: Whether to also measure the loop.

    Raises:
        ValueError: The two implementations disagree.
    """
    import torch

    from mmdenoiserep.evaluation.reid_ranking import rank_matches
    from studies.benchmarks.measure import alternate, peak_memory

    case = make_case(*size)
    tensors = [torch.from_numpy(values) for values in case]
    results: dict[str, dict[str, float]] = {}
    ways: dict[str, Callable] = {'ours': lambda: results.update(ours=rank_matches(*tensors).metrics())}
    if loops:
        ways['loops'] = lambda: results.update(loops=rank_by_loops(*case))
    seconds = alternate(ways, 0, repeats)
    for name, value in results['ours'].items():
        if any(abs(other[name] - value) > 1e-6 for other in results.values()):
            raise ValueError(f'{name} differs: {results}')
    peaks = {'ours': peak_memory(rank_matches, *tensors)}
    if loops:
        peaks['loops'] = peak_memory(rank_by_loops, *case, imports=())
    return [
        dict(way=way, size=list(size), seconds=seconds[way], peak_mib=peaks[way], results=results[way]) for way in ways
    ]


def make_case(queries: int, gallery: int, channels: int) -> list[NDArray]:
    """Returns random features, identities and cameras, each of queries and gallery, with the ratios of Market-1501.

    There are 4.5 queries for each identity and 6 cameras, and a sixth of the gallery are distractors.
    """
    generator = np.random.default_rng(0)
    ids = max(1, round(queries * 750 / 3368))
    pids = [generator.integers(1, ids + 1, number) for number in (queries, gallery)]
    pids[1][generator.random(gallery) < 2793 / 15913] = 0
    camids = [generator.integers(0, 6, number) for number in (queries, gallery)]
    centres = generator.standard_normal((ids + 1, channels), dtype=np.float32)
    features = []
    for identities in pids:
        rows = centres[identities] + 3 * generator.standard_normal((len(identities), channels), dtype=np.float32)
        features.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return [*features, *pids, *camids]


def rank_by_loops(
    query: NDArray,
    gallery: NDArray,
    query_pids: NDArray,
    gallery_pids: NDArray,
    query_camids: NDArray,
    gallery_camids: NDArray,
) -> dict[str, float]:
    """Returns mAP, CMC and mINP by a loop; see :func:`~mmdenoiserep.evaluation.reid_ranking.rank_matches`."""
    distances = np.square(query).sum(1)[:, None] + np.square(gallery).sum(1) - 2 * query @ gallery.T
    order = np.argsort(distances, axis=1)
    hits = gallery_pids[order] == query_pids[:, None]
    rows = []
    for i, ranked in enumerate(order):
        removed = hits[i] & (gallery_camids[ranked] == query_camids[i])
        ranks = 1 + np.flatnonzero(hits[i][~removed])
        if len(ranks):
            precision = np.arange(1, len(ranks) + 1) / ranks
            rows.append([precision.mean(), *(ranks[0] <= k for k in (1, 5, 10)), len(ranks) / ranks[-1]])
    return dict(zip(('mAP', 'rank1', 'rank5', 'rank10', 'mINP'), np.mean(rows, axis=0).tolist(), strict=True))

"""The re-identification metric beside loops over whole matrices.

Random features with identities and cameras as in Market-1501. The other way is the usual one, such as torchreid's: all
distances, all of them sorted, then one query after the other; it is written here in NumPy.
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
        help=f'what to measure both ways at (default: {" ".join(map(str, MARKET))}, Market-1501)',
    )
    parser.add_argument('--repeats', type=int, default=3, help='timed runs of each (default: %(default)s)')
    parser.add_argument('--msmt17', action='store_true', help="measure ours at MSMT17's size, too; takes minutes")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and under ``rows`` its figures by size and way.

    Raises:
        ValueError: The two ways disagree.
        RuntimeError: The system does not tell the memory.
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
        'Seconds: median of the runs, which take turns. Peak memory: what a process grows by in one run, besides the '
        'libraries and the features.'
    )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def measure(size: Sequence[int], repeats: int, loops: bool = True) -> list[dict[str, Any]]:
    """Returns a row for each way: ``way``, ``size``, ``seconds`` of all runs, ``peak_mib`` and ``results``.

    Args:
        size: Queries, gallery and channels.
        repeats: Runs of each.
        loops: Whether to measure the loops, too.

    Raises:
        ValueError: The two ways disagree.
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
    """Returns features, identities and cameras, each of the queries and of the gallery, as Market-1501 has them.

    That is 4.5 queries an identity and 6 cameras; a sixth of the gallery are distractors.
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
    """Returns mAP, CMC and mINP as :meth:`~mmdenoiserep.evaluation.reid_ranking.Ranking.metrics` does, the usual way.

    Args:
        query: Features, (Q, C), float32.
        gallery: Features, (G, C).
        query_pids: Identities, (Q,), integers.
        gallery_pids: Identities, (G,).
        query_camids: Cameras, (Q,), integers.
        gallery_camids: Cameras, (G,).
    """
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

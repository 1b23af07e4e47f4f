"""VMamba-T against Swin-T, and the selective scan against a loop over the positions.

Swin-T is mmpretrain's; both have random weights and run in eval mode without gradients.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from studies.benchmarks.measure import cost_ratio

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
"""Channels of the scan and side of the map in the stages of VMamba-T at 224 pixels."""

PROCESSES = 5
"""Number of processes for the median of the memory, which varies by a tenth."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument(
        '--batch', type=int, nargs='+', default=[1, 4], metavar='N', help='batch sizes (default: 1 and 4)'
    )
    parser.add_argument('--repeats', type=int, default=20, help='timed runs of each case (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``models`` and ``scans``.

    Raises:
        ValueError: The scan and the loop disagree.
        RuntimeError: The system does not report the memory.
    """
    models = [compare_models(args.size, batch, args.repeats) for batch in args.batch]
    scans = [
        compare_scans(channels, side * side, backward, args.repeats)
        for backward in (False, True)
        for channels, side in STAGES
    ]
    lines = [
        f'| images of {args.size} x {args.size} | VMamba-T | Swin-T | ratio (quartiles) '
        '| memory of VMamba-T | of Swin-T | ratio |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in models:
        ours, swin = row['peak_mib']['VMamba-T'], row['peak_mib']['Swin-T']
        memory = f'{ours:.0f} MiB | {swin:.0f} MiB | {ours / swin:.2f}'
        lines.append(f'| {row["batch"]} | {_times(row["seconds"], "VMamba-T", "Swin-T")} | {memory} |')
    lines += ['', '| scan | chunks | loop | ratio (quartiles) |', '|---|---|---|---|']
    for row in scans:
        what = 'forward and backward' if row['backward'] else 'forward'
        size = f'{row["length"]} positions, {row["channels"]} channels, {what}'
        lines.append(f'| {size} | {_times(row["seconds"], "chunks", "loop")} |')
    note = (
        f'Medians of {args.repeats} alternating runs; ratios are taken pair by pair. Memory: peak growth of a process '
        'in its first forward, without the libraries, the weights and the images; '
        f'median of {PROCESSES} processes.'
    )
    return '\n'.join([*lines, '', note]), dict(models=models, scans=scans)


def compare_models(size: int, batch: int, repeats: int) -> dict[str, Any]:
    """Returns ``batch``, ``seconds`` of all runs and ``peak_mib``, both by name of the model."""
    from mmpretrain.models import SwinTransformer

    from mmdenoiserep.core.utils.randomness import random_images
    from mmdenoiserep.models.vmamba import VMamba
    from studies.benchmarks.measure import alternate, peak_memory

    images = random_images((batch, 3, size, size))
    models: dict[str, nn.Module] = {'VMamba-T': VMamba('tiny'), 'Swin-T': SwinTransformer('tiny', pad_small_map=True)}
    for model in models.values():
        model.eval()
    seconds = alternate({name: partial(forward, model, images) for name, model in models.items()}, 2, repeats)
    return dict(
        batch=batch,
        seconds=seconds,
        peak_mib={
            name: median(peak_memory(forward, model, images) for _ in range(PROCESSES))
            for name, model in models.items()
        },
    )


def forward(model: 'nn.Module', images: 'Tensor') -> None:
    """Runs a model without gradients."""
    import torch

    with torch.no_grad():
        model(images)


def compare_scans(channels: int, length: int, backward: bool, repeats: int) -> dict[str, Any]:
    """Returns ``channels``, ``length``, ``backward`` and the ``seconds`` of all runs by implementation, for one image.

    Raises:
        ValueError: The scan and the loop disagree.
    """
    import torch

    from mmdenoiserep.models.selective_scan import selective_scan
    from studies.benchmarks.measure import alternate

    values = make_scan(channels, length)
    y = selective_scan(*values)
    if not torch.allclose(y, scan_by_loop(*values), rtol=1e-4, atol=1e-4 * y.abs().max().item()):
        raise ValueError(f'the scan and the loop disagree at {length} positions')

    def work(scan: Callable) -> None:
        with torch.set_grad_enabled(backward):
            y = scan(*values)
        if backward:
            torch.autograd.grad(y.sum(), values)

    seconds = alternate({'chunks': partial(work, selective_scan), 'loop': partial(work, scan_by_loop)}, 2, repeats)
    return dict(channels=channels, length=length, backward=backward, seconds=seconds)


def make_scan(channels: int, length: int) -> 'list[Tensor]':
    """Returns random arguments of ``selective_scan`` for one image, four directions and one state for each channel."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> 'Tensor':
        return torch.randn(shape, generator=generator)

    sequences, group, each = (1, 4 * channels, length), (1, 4, 1, length), (4 * channels,)
    u, delta, B, C = (random(*shape) for shape in (sequences, sequences, group, group))
    values = [u, delta, -random(*each, 1).exp(), B, C, random(*each), random(*each) - 4]
    return [value.requires_grad_() for value in values]


def scan_by_loop(
    u: 'Tensor', delta: 'Tensor', A: 'Tensor', B: 'Tensor', C: 'Tensor', D: 'Tensor', delta_bias: 'Tensor'
) -> 'Tensor':
    """Computes ``selective_scan`` for one state for each channel, with the recurrence as a loop over the positions."""
    import torch
    import torch.nn.functional as F

    step = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(step * A)
    B, C = (x.expand(-1, -1, u.shape[1] // x.shape[1], -1).flatten(1, 2) for x in (B, C))
    drive = step * u * B
    h = torch.zeros_like(u[..., 0])
    states = []
    for a, b in zip(decay.unbind(-1), drive.unbind(-1), strict=True):
        h = a * h + b
        states.append(h)
    return torch.stack(states, -1) * C + u * D[:, None]


def _times(seconds: dict[str, list[float]], ours: str, other: str) -> str:
    milliseconds = (f'{1000 * median(seconds[name]):.1f} ms' for name in (ours, other))
    return f'{" | ".join(milliseconds)} | {cost_ratio(seconds[ours], seconds[other])}'

"""Time of solving denoisers: the pass against a plain forward, the solution, and peak memory.

ViT-S/16 and ResNet-50 of mmpretrain with random weights and a denoiser on every layer; eval mode without gradients.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmdenoiserep.core import Moments

MODELS = ('ViT-S/16', 'ResNet-50')

GOAL = 1.25
"""Longest time of a pass, in plain forwards."""

PLAIN, SOME, ALL = 'plain forward', 'some vectors', 'all vectors'

IMAGES = 4000
"""Default number of images of tools/calibrate.py."""

RANK = 64
"""The low rank, which is compared with full rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=32, help='images in a batch (default: %(default)s)')
    parser.add_argument('--batches', type=int, default=1, help='batches of a pass (default: %(default)s)')
    parser.add_argument(
        '--stride',
        type=int,
        help='stride of the sampling (default: the choice of tools/calibrate.py)',
    )
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each pass (default: %(default)s)')
    parser.add_argument(
        '--memory', action='store_true', help='also measure the memory of whole calibrations; takes minutes'
    )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``rows``, one for each model.

    Raises:
        RuntimeError: The system does not report the memory.
    """
    from studies.benchmarks.measure import cost_ratio

    rows = [
        compare(name, args.size, args.batch, args.batches, args.stride, args.repeats, args.memory) for name in MODELS
    ]
    passes = [name for name in rows[0]['seconds'] if name != PLAIN]
    lines = ['| model | pass | seconds | plain forward | ratio (quartiles) | goal |', '|---|---|---|---|---|---|']
    for row in rows:
        for name in passes:
            pair = row['seconds'][name], row['seconds'][PLAIN]
            ratio = cost_ratio(*pair)
            seconds = ' | '.join(f'{median(values):.2f}' for values in pair)
            verdict = '' if name == ALL else f'{"met" if ratio.median <= GOAL else "missed"} (at most {GOAL})'
            what = name.replace(SOME, f'{row["strides"]} of the vectors')
            lines.append(f'| {row["model"]} | {what} | {seconds} | {ratio} | {verdict} |')
    for title, key, form in (
        ('seconds to solve all layers', 'solving', '{:.1f}'),
        ('memory at the peak', 'peak_mib', '{:,.0f} MiB'),
    ):
        lines += ['', f'| {title} | {" | ".join(MODELS)} |', '|---|---|---|'] if rows[0][key] else []
        for name in rows[0][key]:
            lines.append(f'| {name} | {" | ".join(form.format(row[key][name]) for row in rows)} |')
    note = (
        f'{args.batches} batches of {args.batch} images of {args.size} x {args.size}. Passes: medians of '
        f'{args.repeats} alternating runs; ratios are taken pair by pair. Solving: time of one layer of each width, '
        'times their number.'
    )
    if args.memory:
        note += (
            ' Memory: peak growth of a process without the libraries, the model and the images, for a calibration '
            'on one batch.'
        )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def compare(
    name: str, size: int, batch: int, batches: int, stride: int | None, repeats: int, memory: bool
) -> dict[str, Any]:
    """Returns the figures of one model.

    Args:
        name: One of :data:`MODELS`.
        size: Side of the images in pixels.
        batch: Images in a batch.
        batches: Batches of a pass.
        stride: Stride of the sampling; None takes the choice of tools/calibrate.py.
        repeats: Timed runs of each pass.
        memory: Whether to measure the memory.

    Returns:
        ``model``, ``strides``, ``seconds`` of all runs by pass, ``solving`` in seconds by rank, and ``peak_mib`` by
        rank, empty without ``memory``.
    """
    from mmdenoiserep.apis.calibration import choose_strides, describe_strides, measure_vectors
    from mmdenoiserep.core import apply_denoiserep, collect_moments, select_layers
    from mmdenoiserep.core.utils.randomness import random_images
    from studies.benchmarks.measure import alternate, peak_memory

    images = random_images((batch, 3, size, size))
    plain = build(name, images)
    converted, low_rank = deepcopy(plain), deepcopy(plain)
    apply_denoiserep(converted, 'all', rank=None, example_input=images[:1])
    apply_denoiserep(low_rank, 'all', rank=RANK, example_input=images[:1])
    layers = select_layers(plain, 'all', example_input=images[:1])
    denoised = {name: converted.get_submodule(name) for name in layers}
    if stride is None:
        stride = choose_strides(measure_vectors(plain, layers, images[:1], inputs=True), IMAGES)
    loader = [images] * batches
    runs: dict[str, Callable] = {PLAIN: partial(forward, plain, loader)}
    for which, part in ((SOME, stride), (ALL, 1)):
        runs[which] = partial(collect_moments, converted, denoised, loader, inputs=True, stride=part)
    seconds = alternate(runs, 1, repeats)
    inputs = collect_moments(converted, denoised, [images], inputs=True, stride=stride)
    peaks: dict[str, tuple] = {}
    if memory:
        peaks[PLAIN] = forward, plain, [images]
        for rank, model in ((None, converted), (RANK, low_rank)):
            peaks[_rank(rank)] = solve, model, images, stride
    return dict(
        model=name,
        strides=describe_strides(stride),
        seconds=seconds,
        solving=time_solving(converted, inputs),
        peak_mib={key: peak_memory(*call) for key, call in peaks.items()},
    )


def build(name: str, images: 'Tensor') -> 'nn.Module':
    """Returns a model with random weights, whose BatchNorm statistics are updated on the images once."""
    import torch
    from mmpretrain.models import ResNet, VisionTransformer

    torch.manual_seed(0)
    if name == 'ViT-S/16':
        model: nn.Module = VisionTransformer('deit-small', img_size=images.shape[-1], patch_size=16)
    else:
        model = ResNet(50)
        forward(model, [images])  # in training mode, which updates BatchNorm
    model.eval()  # mmpretrain's eval() does not return the model
    return model


def forward(model: 'nn.Module', batches: 'Sequence[Tensor]') -> None:
    """Runs a model without gradients."""
    import torch

    with torch.no_grad():
        for batch in batches:
            model(batch)


def solve(model: 'nn.Module', images: 'Tensor', stride: 'int | Mapping[str, int]') -> None:
    """Solves the denoisers of a model on one batch."""
    from mmdenoiserep.core import solve_denoisers

    solve_denoisers(model, [images], stride=stride)


def time_solving(model: 'nn.Module', inputs: 'dict[str, Moments]') -> dict[str, float]:
    """Returns the seconds to solve all layers by rank, from one layer of each width.

    Args:
        model: A model with denoisers.
        inputs: Moments of the layers' inputs.
    """
    from mmdenoiserep.core import closed_form
    from studies.benchmarks.measure import alternate

    layers: dict[str, Any] = dict(model.named_modules())
    widths: dict[tuple[int, ...], list[str]] = {}
    for name, seen in inputs.items():
        widths.setdefault(tuple(seen.mean.shape), []).append(name)

    def solve_layer(name: str, rank: int | None) -> None:
        seen, layer = inputs[name], layers[name]
        closed_form(seen.mean, seen.second_moment, layer.reverse_step, rank, layer.denoiser.bias is not None)

    def seconds(name: str, rank: int | None) -> float:
        return alternate({name: partial(solve_layer, name, rank)}, 0, 1)[name][0]

    return {
        _rank(rank): sum(len(names) * seconds(names[0], rank) for names in widths.values()) for rank in (None, RANK)
    }


def _rank(rank: int | None) -> str:
    return f'rank {rank}' if rank else 'full rank'

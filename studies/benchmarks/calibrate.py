"""The passes that calibration makes beside a plain forward, what it solves after them, and its memory.

ViT-S/16 and ResNet-50 of mmpretrain with random weights and a denoiser on every layer; eval mode without gradients.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmdenoiserep.core import Moments

MODELS = ('ViT-S/16', 'ResNet-50')

GOAL = 1.25
"""The most that a pass may take, in plain forwards."""

PLAIN, SOME, ALL = 'plain forward', 'some vectors', 'all vectors'

IMAGES = 4000
"""The images that tools/calibrate.py takes."""

RANK = 64
"""The low rank beside the full one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=32, help='images in a batch (default: %(default)s)')
    parser.add_argument('--batches', type=int, default=1, help='batches of a pass (default: %(default)s)')
    parser.add_argument(
        '--every',
        type=int,
        help='one in so many vectors is taken (default: as tools/calibrate.py does)',
    )
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each (default: %(default)s)')
    parser.add_argument(
        '--memory', action='store_true', help='measure the memory of whole calibrations, too; takes minutes'
    )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``rows``, one for each model.

    Raises:
        RuntimeError: The system does not tell the memory.
    """
    rows = [
        compare(name, args.size, args.batch, args.batches, args.every, args.repeats, args.memory) for name in MODELS
    ]
    passes = [name for name in rows[0]['seconds'] if name != PLAIN]
    lines = ['| model | pass | seconds | plain forward | ratio (quartiles) | goal |', '|---|---|---|---|---|---|']
    for row in rows:
        for name in passes:
            pair = row['seconds'][name], row['seconds'][PLAIN]
            low, ratio, high = np.percentile([a / b for a, b in zip(*pair, strict=True)], [25, 50, 75])
            seconds = ' | '.join(f'{median(values):.2f}' for values in pair)
            verdict = f'{"met" if ratio <= GOAL else "missed"} (at most {GOAL})' if not name.endswith(ALL) else ''
            what = name.replace(SOME, f'one in {row["every"]} vectors')
            lines.append(f'| {row["model"]} | {what} | {seconds} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {verdict} |')
    for title, key, form in (
        ('seconds to solve all layers', 'solving', '{:.1f}'),
        ('memory at the peak', 'peak_mib', '{:,.0f} MiB'),
    ):
        lines += ['', f'| {title} | {" | ".join(MODELS)} |', '|---|---|---|'] if rows[0][key] else []
        for name in rows[0][key]:
            lines.append(f'| {name} | {" | ".join(form.format(row[key][name]) for row in rows)} |')
    note = (
        f'{args.batches} batches of {args.batch} images of {args.size} x {args.size}. Passes: median of {args.repeats} '
        'runs, which take turns; ratios are taken pair by pair. Solving: one layer of each width, times their number.'
    )
    if args.memory:
        note += (
            ' Memory: what a process grows by besides the libraries, the model, the images and the moments of the '
            'source, all calibrated on one batch.'
        )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def compare(
    name: str, size: int, batch: int, batches: int, every: int | None, repeats: int, memory: bool
) -> dict[str, Any]:
    """Returns the figures of one model.

    Args:
        name: One of :data:`MODELS`.
        size: Side of the images in pixels.
        batch: Images in a batch.
        batches: Batches of a pass.
        every: One in so many vectors is taken; None takes what tools/calibrate.py does.
        repeats: Timed runs of each pass.
        memory: Whether to measure the memory.

    Returns:
        ``model``, ``every``, ``seconds`` of all runs by pass, ``solving`` in seconds by mode and rank, and ``peak_mib``
        by what is run, empty without ``memory``.
    """
    import torch

    from mmdenoiserep.apis.calibration import choose_every, measure_activations
    from mmdenoiserep.core import apply_denoiserep, collect_moments, select_layers
    from studies.benchmarks.measure import alternate, peak_memory

    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain = build(name, images)
    converted, low_rank = deepcopy(plain), deepcopy(plain)
    apply_denoiserep(converted, 'all', rank=None, example_input=images[:1])
    apply_denoiserep(low_rank, 'all', rank=RANK, example_input=images[:1])
    layers = select_layers(plain, 'all', example_input=images[:1])
    denoised = {name: converted.get_submodule(name) for name in layers}
    if every is None:
        every = choose_every(measure_activations(plain, layers, images[:1]), IMAGES)
    loader = [images] * batches
    runs: dict[str, Callable] = {PLAIN: partial(forward, plain, loader)}
    for mode, part in (('schedule', every), ('domain', every), ('schedule', 1)):
        subject = (converted, denoised) if mode == 'schedule' else (plain, layers)
        runs[f'{mode}, {SOME if part == every else ALL}'] = partial(
            collect_moments, *subject, loader, inputs=mode == 'schedule', every=part
        )
    seconds = alternate(runs, 1, repeats)
    inputs = collect_moments(converted, denoised, [images], inputs=True, every=every)
    source = collect_moments(plain, layers, [images], every=every)
    peaks: dict[str, tuple] = {}
    if memory:
        peaks[PLAIN] = forward, plain, [images]
        for rank, model in ((None, converted), (RANK, low_rank)):
            peaks[f'schedule, {_rank(rank)}'] = fit, model, images, None, None, every
            peaks[f'domain, {_rank(rank)}'] = fit, plain, images, source, rank, every
    return dict(
        model=name,
        every=every,
        seconds=seconds,
        solving=time_solving(converted, inputs, source),
        peak_mib={key: peak_memory(*call) for key, call in peaks.items()},
    )


def build(name: str, images: 'Tensor') -> 'nn.Module':
    """Returns a model with random weights, and BatchNorm statistics moved towards those of the images."""
    import torch
    from mmpretrain.models import ResNet, VisionTransformer

    torch.manual_seed(0)
    if name == 'ViT-S/16':
        model: nn.Module = VisionTransformer('deit-small', img_size=images.shape[-1], patch_size=16)
    else:
        model = ResNet(50)
        forward(model, [images])  # in training mode: BatchNorm follows the images
    model.eval()  # mmpretrain's does not return the model
    return model


def forward(model: 'nn.Module', batches: 'Sequence[Tensor]') -> None:
    """Runs a model without gradients."""
    import torch

    with torch.no_grad():
        for batch in batches:
            model(batch)


def fit(
    model: 'nn.Module',
    images: 'Tensor',
    source: 'dict[str, Moments] | None',
    rank: int | None,
    every: int,
) -> None:
    """Solves the denoisers of a model on one batch, or with a source, fits its layers to it."""
    from mmdenoiserep.core import fit_domain, select_layers, solve_denoisers

    if source is None:
        solve_denoisers(model, [images], every=every)
    else:
        layers = select_layers(model, 'all', example_input=images[:1])
        fit_domain(model, layers, [images], source, rank=rank, every=every)


def time_solving(model: 'nn.Module', inputs: 'dict[str, Moments]', outputs: 'dict[str, Moments]') -> dict[str, float]:
    """Returns the seconds that solving all layers takes, by mode and rank.

    Layers of one width take the same time, so one of each is solved.

    Args:
        model: A model with denoisers.
        inputs: The moments that schedule mode solves with, by layer.
        outputs: Those of domain mode.
    """
    from mmdenoiserep.core import closed_form, transport
    from studies.benchmarks.measure import alternate

    layers = dict(model.named_modules())

    def solve_schedule(name: str, rank: int | None) -> None:
        seen, layer = inputs[name], layers[name]
        closed_form(seen.mean, seen.second_moment, layer.reverse_step, rank, layer.denoiser.bias is not None)

    def solve_domain(name: str, rank: int | None) -> None:
        transport(outputs[name], outputs[name], rank=rank)

    seconds = {}
    for mode, moments, solve in (('schedule', inputs, solve_schedule), ('domain', outputs, solve_domain)):
        widths: dict[tuple[int, ...], list[str]] = {}
        for name, seen in moments.items():
            widths.setdefault(tuple(seen.mean.shape), []).append(name)
        for rank in (None, RANK):
            seconds[f'{mode}, {_rank(rank)}'] = sum(
                len(names) * alternate({'solve': partial(solve, names[0], rank)}, 0, 1)['solve'][0]
                for names in widths.values()
            )
    return seconds


def _rank(rank: int | None) -> str:
    return f'rank {rank}' if rank else 'full rank'

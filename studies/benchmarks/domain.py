"""Cost of a domain fit at real size: both passes against a plain forward of the same images, solving, peak memory.

Models of mmpretrain and mmdet with random weights, all layers fitted; eval mode without gradients. One process
gathers the moments of a model and another one fits it; both take turns with the plain forward.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SHAPES = ((800, 1333), (800, 1067), (1333, 800), (800, 800))
"""Sizes of the detector's images, which are padded to multiples of 32."""

MODELS: dict[str, tuple[int, int, float, float, float, float]] = {
    'ViT-S/16': (512, 32, 1.20, 1.25, 10, 2.5),
    'ResNet-50': (512, 32, 1.20, 1.30, 10, 4),
    'MobileNetV2': (512, 32, 1.20, 1.30, 3, 3),
    'ViT-L/16': (128, 16, 1.20, 1.25, 300, 8),
    'Swin-T with FPN': (32, 2, 1.20, 1.30, 30, 8),
}
"""Images, images in a batch, and goals: moments and fit in plain forwards, seconds to solve, GiB at the peak."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS), help='models (default: all)')
    parser.add_argument('--images', type=int, help='number of images (default: 512, 128 or 32)')
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=1, help='timed rounds (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``rows``, one for each model."""
    from tempfile import TemporaryDirectory

    from studies.benchmarks.measure import cost_ratio, isolated

    lines = [
        '| model | images | moments | fit | solving | peak memory |',
        '|---|---|---|---|---|---|',
    ]
    rows = []
    for name in args.models:
        images, batch, *goals = MODELS[name]
        with TemporaryDirectory() as folder:
            case = name, args.images or images, batch, args.size, args.repeats, f'{folder}/moments.pth'
            gathered, fitted = isolated(measure_moments, *case), isolated(measure_fit, *case)
        rows.append(dict(model=name, images=args.images or images, moments=gathered, fit=fitted))
        ratios = cost_ratio(gathered['moments'], gathered['plain']), cost_ratio(fitted['fit'], fitted['plain'])
        costs = [ratio.median for ratio in ratios] + [median(fitted['solving']), fitted['peak']]
        forms = '{:.2f}', '{:.2f}', '{:.1f} s', '{:.1f} GiB'
        cells = [
            f'{form.format(cost)} ({"met" if cost <= goal else "**missed**"}: {form.format(goal)})'
            for form, cost, goal in zip(forms, costs, goals, strict=True)
        ]
        lines.append(f'| {name} | {args.images or images} | {" | ".join(cells)} |')
    note = (
        'In brackets: the goals. Moments and fit: seconds in plain forwards of the same images, medians of '
        f'{args.repeats} alternating rounds; the fit is without the solving. Peak memory: of a whole process that '
        'loads the moments and fits, with libraries, model and images.'
    )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def measure_moments(name: str, count: int, batch: int, size: int, repeats: int, path: str) -> dict[str, Any]:
    """Gathers the moments of a model, and writes them to a file.

    Returns:
        ``plain`` and ``moments``, in seconds of all rounds.
    """
    from mmdenoiserep.core import collect_moments, save_moments
    from studies.benchmarks.measure import alternate

    model, images, layers, strides = prepare(name, count, batch, size)
    runs = dict(
        plain=lambda: forward(model, images),
        moments=lambda: collect_moments(model, layers, images, stride=strides),
    )
    seconds = alternate(runs, 0, repeats)
    save_moments(runs['moments'](), path, {})
    return seconds


def measure_fit(name: str, count: int, batch: int, size: int, repeats: int, path: str) -> dict[str, Any]:
    """Fits copies of a model to noisy images.

    Returns:
        ``plain``, ``fit`` (without the solving) and ``solving``, in seconds of all rounds; ``peak`` in GiB.
    """
    from copy import deepcopy
    from unittest.mock import patch

    from mmdenoiserep.core import fit_domain, load_moments
    from mmdenoiserep.core.calibration.domain import DomainPass
    from studies.benchmarks.measure import peak

    model, images, layers, strides = prepare(name, count, batch, size, noise=0.2)
    fit_layer, source = DomainPass._fit, load_moments(path)[0]

    def fit_copy() -> dict[str, float]:
        plain, _ = timed(lambda: forward(model, images))
        fitted, solving = deepcopy(model), list[float]()
        chosen = {name: fitted.get_submodule(name) for name in layers}

        def timed_fit(domain: DomainPass, layer: str) -> None:
            solving.append(timed(lambda: fit_layer(domain, layer))[0])

        with patch.object(DomainPass, '_fit', timed_fit):
            total, _ = timed(lambda: fit_domain(fitted, chosen, images, source, stride=strides))
        return dict(plain=plain, fit=total - sum(solving), solving=sum(solving))

    rows = [fit_copy() for _ in range(repeats)]
    return {key: [row[key] for row in rows] for key in rows[0]} | dict(peak=peak() / 1024)


def prepare(name: str, count: int, batch: int, size: int, noise: float = 0.0) -> tuple[Any, 'Images', Any, dict]:
    """Returns a model that has run twice, its images, its layers and their strides."""
    from mmdenoiserep.apis.calibration import choose_strides, measure_vectors
    from mmdenoiserep.core import select_layers

    model, images = build(name, size), Images(count, batch, size, name, noise)
    example = next(iter(images))[:1]
    layers = select_layers(model, 'all', example_input=example)
    forward(model, images, 2)
    return model, images, layers, choose_strides(measure_vectors(model, layers, example), len(images))


class Images:
    """Random images, batch by batch, the same ones in every pass; those of the detector have several sizes.

    Args:
        count: Number of images.
        batch: Images in a batch.
        size: Side in pixels.
        name: Name of the model.
        noise: Standard deviation of noise that is added.
    """

    def __init__(self, count: int, batch: int, size: int, name: str, noise: float = 0.0) -> None:
        self.count = count
        self.batch = batch
        shapes = SHAPES if 'FPN' in name and size == 224 else ((size, size),)
        self.shapes = [tuple(-(-side // 32) * 32 for side in shape) for shape in shapes]
        self.noise = noise

    def __len__(self) -> int:
        return -(-self.count // self.batch) * self.batch

    def __iter__(self) -> 'Iterator[Tensor]':
        """Yields batches, (B, 3, H, W)."""
        from mmdenoiserep.core.utils.randomness import random_images

        for number in range(len(self) // self.batch):
            shape = (self.batch, 3, *self.shapes[number % len(self.shapes)])
            images = random_images(shape, seed=number)
            yield images + self.noise * random_images(shape, seed=number + 10**6) if self.noise else images


def build(name: str, size: int) -> 'nn.Module':
    """Returns a model with random weights, whose BatchNorm statistics are updated on some images once."""
    import torch
    from mmdet.models import FPN, SwinTransformer
    from mmpretrain.models import MobileNetV2, ResNet, VisionTransformer

    torch.manual_seed(0)
    model: Any
    if name.startswith('ViT'):
        model = VisionTransformer('deit-small' if 'S' in name else 'large', img_size=size, patch_size=16)
    elif name == 'ResNet-50':
        model = ResNet(50)
    elif name == 'MobileNetV2':
        model = MobileNetV2()
    else:
        model = torch.nn.Sequential(SwinTransformer(out_indices=(0, 1, 2, 3)), FPN([96, 192, 384, 768], 256, 5))
    if name in ('ResNet-50', 'MobileNetV2'):
        forward(model, Images(16, 16, size, name), 1)  # in training mode, which updates BatchNorm
    model.eval()
    return model


def forward(model: 'nn.Module', batches: Images, most: int | None = None) -> None:
    """Runs a model without gradients on all batches, or the first ones."""
    import torch

    with torch.no_grad():
        for number, batch in enumerate(batches):
            if number == most:
                return
            model(batch)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a call, and its result."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result

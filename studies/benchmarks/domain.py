"""Cost of a domain fit at real size: both passes against a plain forward of the same images, solving, peak memory.

Models of mmpretrain and mmdet with random weights, all layers fitted at full rank; eval mode without gradients. Each
model runs in a process of its own: a forward to warm up, then ``repeats`` rounds of plain forward, moments and fit.
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
    from studies.benchmarks.measure import isolated

    lines = [
        '| model | images | moments | goal | fit | goal | solving | goal | peak memory | goal |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    rows = []
    for name in args.models:
        images, batch, moments, fit, solving, memory = MODELS[name]
        row = isolated(measure, name, args.images or images, batch, args.size, args.repeats)
        rows.append(row)
        ratios = {key: median(a / b for a, b in zip(row[key], row['plain'], strict=True)) for key in ('moments', 'fit')}
        lines.append(
            f'| {name} | {row["images"]} | {ratios["moments"]:.2f} | {moments:.2f} | {ratios["fit"]:.2f} | {fit:.2f} | '
            f'{median(row["solving"]):.1f} s | {solving:g} s | {row["peak"]:.1f} GiB | {memory:g} GiB |'
        )
    note = (
        'Moments and fit: seconds in plain forwards of the same images (medians of '
        f'{args.repeats} alternating rounds); the fit is without the solving. Peak memory: of the whole process, '
        'libraries, model and images included, at the fit.'
    )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def measure(name: str, count: int, batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Returns the figures of one model.

    Returns:
        ``images``; ``plain``, ``moments``, ``fit`` and ``solving`` in seconds of all rounds; ``peak`` in GiB.
    """
    from studies.benchmarks.measure import peak

    model = build(name, size)
    images, noisy = (Images(count, batch, size, name, noise) for noise in (0.0, 0.2))
    forward(model, images, 2)
    rounds = [measure_round(model, images, noisy) for _ in range(repeats)]
    seconds = {key: [one[key] for one in rounds] for key in rounds[0]}
    return dict(seconds, model=name, images=len(images), peak=peak() / 1024)


def measure_round(model: 'nn.Module', images: 'Images', noisy: 'Images') -> dict[str, float]:
    """Returns the seconds of a plain forward, of both passes, and of solving; a copy of the model is fitted."""
    from copy import deepcopy
    from tempfile import TemporaryDirectory
    from unittest.mock import patch

    from mmdenoiserep.apis.calibration import choose_strides, measure_vectors
    from mmdenoiserep.core import collect_moments, fit_domain, load_moments, save_moments, select_layers
    from mmdenoiserep.core.calibration.domain import DomainPass

    example = next(iter(images))[:1]
    layers = select_layers(model, 'all', example_input=example)
    strides = choose_strides(measure_vectors(model, layers, example), len(images))
    plain, _ = timed(lambda: forward(model, images))
    moments, gathered = timed(lambda: collect_moments(model, layers, images, stride=strides))
    fitted, fit_layer, solving = deepcopy(model), DomainPass._fit, []
    chosen = {name: fitted.get_submodule(name) for name in layers}

    def timed_fit(domain: DomainPass, layer: str) -> None:
        solving.append(timed(lambda: fit_layer(domain, layer))[0])

    with TemporaryDirectory() as folder, patch.object(DomainPass, '_fit', timed_fit):
        save_moments(gathered, f'{folder}/moments.pth', {})
        del gathered
        source, _ = load_moments(f'{folder}/moments.pth')
        total, _ = timed(lambda: fit_domain(fitted, chosen, noisy, source, stride=strides))
    return dict(plain=plain, moments=moments, fit=total - sum(solving), solving=sum(solving))


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

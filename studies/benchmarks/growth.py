"""Growth of the time of a calibration with the number of images and of parameters.

Vision transformers of mmpretrain with random weights, patches of 16 pixels, and a denoiser on every layer.
"""

import argparse
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

IMAGES = (32, 64, 128)
WIDTHS = (96, 192, 384)
"""Embedding dimensions of the models; the last one is ViT-S."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--layers', type=int, default=12, help='blocks of a model (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=3, help='timed runs of each case (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``images`` and ``parameters``."""
    from studies.benchmarks.measure import alternate, exponent

    middle = WIDTHS[-1]
    models = {width: build(width, args.layers, args.size) for width in WIDTHS}
    cases = {(middle, images) for images in IMAGES} | {(width, IMAGES[0]) for width in WIDTHS}
    seconds = alternate(
        {f'{width} {images}': partial(fit, models[width], images, args.size) for width, images in sorted(cases)},
        1,
        args.repeats,
    )

    def time(width: int, images: int) -> float:
        return median(seconds[f'{width} {images}'])

    parameters = {width: count_parameters(model) for width, model in models.items()}
    by_images = exponent(IMAGES, [time(middle, images) for images in IMAGES])
    by_parameters = exponent(list(parameters.values()), [time(width, IMAGES[0]) for width in WIDTHS])
    lines = [
        '| million parameters | images | seconds to calibrate |',
        '|---|---|---|',
        *(f'| {parameters[w] / 1e6:.1f} | {n} | {time(w, n):.1f} |' for w, n in sorted(cases)),
        '',
        f'Seconds grow as images^{by_images:.2f} and as parameters^{by_parameters:.2f}: one pass of batches of 32, of '
        f'which one in 16 vectors is taken, and solving all layers. Medians of {args.repeats} runs, which take turns.',
    ]
    return '\n'.join(lines), dict(seconds=seconds, images=by_images, parameters=by_parameters)


def build(width: int, layers: int, size: int) -> 'nn.Module':
    """Returns a transformer with denoisers."""
    import torch
    from mmpretrain.models import VisionTransformer

    from mmdenoiserep import apply_denoiserep

    torch.manual_seed(0)
    arch = dict(embed_dims=width, num_layers=layers, num_heads=3, feedforward_channels=4 * width)
    model = VisionTransformer(arch, img_size=size, patch_size=16)
    apply_denoiserep(model, 'all', example_input=torch.randn(1, 3, size, size))
    return model


def count_parameters(model: 'nn.Module') -> int:
    """Returns the number of parameters without denoisers."""
    return sum(p.numel() for name, p in model.named_parameters() if '.denoiser.' not in name)


def fit(model: 'nn.Module', images: int, size: int) -> None:
    """Solves the denoisers of a model."""
    from mmdenoiserep import solve_denoisers
    from mmdenoiserep.core.utils.randomness import random_images

    solve_denoisers(model, [random_images((32, 3, size, size))] * (images // 32), stride=16)

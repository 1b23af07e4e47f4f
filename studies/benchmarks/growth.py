"""Growth of the time of a domain fit with the number of images and of layers.

Vision transformers of mmpretrain with random weights, patches of 16 pixels; all layers fitted.
"""

import argparse
from copy import deepcopy
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mmdenoiserep.core import Moments

IMAGES = (64, 128, 256)
BLOCKS = (3, 6, 12)
"""Transformer blocks of the models; each has four layers that are fitted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--width', type=int, default=192, help='channels of a token (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=3, help='timed runs of each case (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``images`` and ``layers``."""
    from studies.benchmarks.measure import alternate, exponent

    models = {blocks: build(args.width, blocks, args.size) for blocks in BLOCKS}
    sources = {blocks: gather(model, args.size) for blocks, model in models.items()}
    cases = sorted({(BLOCKS[-1], images) for images in IMAGES} | {(blocks, IMAGES[0]) for blocks in BLOCKS})
    seconds = alternate(
        {f'{b} {n}': partial(fit, models[b], sources[b], n, args.size) for b, n in cases}, 1, args.repeats
    )
    times = {case: median(seconds[f'{case[0]} {case[1]}']) for case in cases}
    layers = {blocks: len(source) for blocks, source in sources.items()}
    by_images = exponent(IMAGES, [times[BLOCKS[-1], images] for images in IMAGES])
    by_layers = exponent([layers[b] for b in BLOCKS], [times[b, IMAGES[0]] for b in BLOCKS])
    lines = [
        '| layers | images | seconds to fit |',
        '|---|---|---|',
        *(f'| {layers[b]} | {n} | {times[b, n]:.1f} |' for b, n in cases),
        '',
        f'Seconds grow as images^{by_images:.2f} and as layers^{by_layers:.2f}: one pass of batches of 32, which '
        f'takes one in 16 vectors, and solving all layers. Medians of {args.repeats} runs, which take turns.',
    ]
    return '\n'.join(lines), dict(seconds=seconds, images=by_images, layers=by_layers)


def build(width: int, blocks: int, size: int) -> 'nn.Module':
    """Returns a transformer."""
    import torch
    from mmpretrain.models import VisionTransformer

    torch.manual_seed(0)
    arch = dict(embed_dims=width, num_layers=blocks, num_heads=3, feedforward_channels=4 * width)
    model = VisionTransformer(arch, img_size=size, patch_size=16)
    model.eval()  # mmpretrain's eval() does not return the model
    return model


def gather(model: 'nn.Module', size: int) -> 'dict[str, Moments]':
    """Returns the moments of all layers on 32 images."""
    from mmdenoiserep import collect_moments, select_layers
    from mmdenoiserep.core.utils.randomness import random_images

    images = random_images((32, 3, size, size))
    return collect_moments(model, select_layers(model, 'all', example_input=images[:1]), [images], stride=16)


def fit(model: 'nn.Module', source: 'dict[str, Moments]', images: int, size: int) -> None:
    """Fits a copy of a model to noisy images."""
    from mmdenoiserep import fit_domain
    from mmdenoiserep.core.utils.randomness import random_images

    fitted = deepcopy(model)
    layers = {name: fitted.get_submodule(name) for name in source}
    noisy = random_images((32, 3, size, size)) + random_images((32, 3, size, size), seed=1)
    fit_domain(fitted, layers, [noisy] * (images // 32), source, stride=16)

"""Differences of exported and int8 models from torch in float32, and file sizes.

Each model has random weights and random, fused denoisers on every layer of its backbone. It is compared with the same
model without denoisers.
"""

import argparse
import io
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmdenoiserep.apis.export import Deployed

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/demo'
MODELS = {
    'vit_fashion-mnist': 28,
    'resnet_fashion-mnist': 28,
    'swin_fashion-mnist': 28,
    'vmamba_fashion-mnist': 28,
    'segformer_mit_scenes': 128,
    'mask-rcnn_swin_scenes': 128,
}
"""Side of the images in pixels by name of the config."""

BATCHES = (1, 2, 3)
"""Batch sizes to try with a dynamic batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        '--models', nargs='+', choices=MODELS, default=list(MODELS), metavar='NAME', help='default: all six'
    )
    parser.add_argument(
        '--strength',
        type=float,
        default=0.3,
        help='share of its input that a random denoiser removes, about (default: %(default)s)',
    )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``rows``, one for each model."""
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime warns of every integer tensor that it does not quantise
    rows = [compare(name, args.strength) for name in args.models]
    exports = list(rows[0]['exports'])
    lines = [
        f'| model | image | {" | ".join(exports)} |',
        f'|---|---|{"---|" * len(exports)}',
    ]
    for row in rows:
        cells = [value if isinstance(value, str) else f'{value:.1e}' for value in row['exports'].values()]
        lines.append(f'| {row["model"]} | {" x ".join(map(str, row["image"]))} | {" | ".join(cells)} |')
    lines += [
        '',
        '| model | int8 by | error fused | error vanilla | ratio | float32, fused, vanilla | int8, fused, vanilla |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        for name, figures in row['int8'].items():
            fused, vanilla = figures['fused'], figures['vanilla']
            sizes = (
                f'{fused[key] / 1e3:,.1f} and {vanilla[key] / 1e3:,.1f} kB' for key in ('float32_bytes', 'int8_bytes')
            )
            ratio = f'{fused["error"] / vanilla["error"]:.2f}' if vanilla['error'] else 'no Linear layer'
            lines.append(
                f'| {row["model"]} | {name} | {fused["error"]:.2%} | {vanilla["error"]:.2%} '
                f'| {ratio} | {" | ".join(sizes)} |'
            )
    note = (
        'Exports of the fused model: largest difference over the largest output, in float32; for a dynamic batch the '
        f'largest over batches of {BATCHES[0]} to {BATCHES[-1]} images. int8: root mean square of the error over the '
        'root mean square of the output, 16 images.'
    )
    return '\n'.join([*lines, '', note]), dict(rows=rows)


def compare(name: str, strength: float) -> dict[str, Any]:
    """Returns the figures of one model.

    Returns:
        ``model``, ``image`` (C, H, W), ``exports``: the difference, or the name of the raised error, by exporter, and
        ``int8``: ``error``, ``float32_bytes`` and ``int8_bytes`` of the fused and the vanilla model by quantiser.
    """
    import torch

    from mmdenoiserep.apis.export import export_onnx, largest_difference, run_onnx
    from mmdenoiserep.core.utils.randomness import random_images

    fused, vanilla, shape = build_pair(name, strength)

    def by_onnx(dynamo: bool, dynamic_batch: bool) -> float:
        with TemporaryDirectory() as folder:
            path = Path(folder) / 'model.onnx'
            export_onnx(fused, shape, path, dynamic_batch, dynamo)
            batches = [random_images((n, *shape), seed=n) for n in (BATCHES if dynamic_batch else (1,))]
            return max(largest_difference(run_onnx(path, images), fused(images)) for images in batches)

    def by_export() -> float:
        images = random_images((2, *shape), seed=2)
        return largest_difference(torch.export.export(fused, (images,)).module()(images), fused(images))

    with torch.no_grad():
        return dict(
            model=name,
            image=shape,
            exports={
                'ONNX': attempt(by_onnx, False, False),
                'ONNX, dynamic batch': attempt(by_onnx, False, True),
                'ONNX, new exporter': attempt(by_onnx, True, False),
                'ONNX, new exporter, dynamic batch': attempt(by_onnx, True, True),
                'torch.export': attempt(by_export),
            },
            int8={
                quantiser.__name__.removeprefix('by_'): {
                    kind: quantiser(model, random_images((16, *shape), seed=16))
                    for kind, model in (('fused', fused), ('vanilla', vanilla))
                }
                for quantiser in (by_torch, by_onnxruntime)
            },
        )


def attempt(function: Callable[..., float], *args: bool) -> float | str:
    """Returns the result of a function, or the name of the error that it raises."""
    try:
        return function(*args)
    except Exception as error:  # exporters fail in many ways
        return type(error).__name__


def build_pair(name: str, strength: float) -> 'tuple[Deployed, Deployed, tuple[int, int, int]]':
    """Returns a model with fused random denoisers, the same model without them, and the shape (C, H, W) of an image."""
    import torch

    from mmdenoiserep import apply_denoiserep, fuse_model
    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.export import Deployed, image_shape
    from mmdenoiserep.apis.model import build_model
    from mmdenoiserep.core.utils.randomness import random_images

    cfg = load_config(CONFIGS / f'{name}.py')
    torch.manual_seed(0)
    vanilla = build_model(cfg)
    denoised = deepcopy(vanilla)
    shape = image_shape(cfg, vanilla, (MODELS[name], MODELS[name]))
    apply_denoiserep(denoised.backbone, 'all', example_input=random_images((1, *shape), seed=1))
    for key, parameter in denoised.named_parameters():
        if '.denoiser.' in key:
            torch.nn.init.normal_(parameter, std=strength / parameter.shape[-1] ** 0.5)
    return Deployed(fuse_model(denoised)), Deployed(vanilla), shape


def by_torch(model: 'nn.Module', images: 'Tensor') -> dict[str, float]:
    """Quantises the weights of all Linear layers with torch; their inputs are quantised dynamically."""
    import torch

    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def size(module: 'nn.Module') -> int:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return file.tell()

    return dict(
        error=relative_error(quantised(images), model(images)), float32_bytes=size(model), int8_bytes=size(quantised)
    )


def by_onnxruntime(model: 'Deployed', images: 'Tensor') -> dict[str, float]:
    """Quantises the weights of all matrix products and convolutions of an ONNX file with onnxruntime."""
    import torch
    from onnxruntime.quantization import quantize_dynamic

    from mmdenoiserep.apis.export import export_onnx, run_onnx

    with TemporaryDirectory() as folder:
        path, small = Path(folder) / 'model.onnx', Path(folder) / 'int8.onnx'
        export_onnx(model, images.shape[1:], path)
        quantize_dynamic(path, small)
        outputs = zip(*(run_onnx(small, image) for image in images.split(1)), strict=True)
        return dict(
            error=relative_error(list(map(torch.cat, outputs)), model(images)),
            float32_bytes=path.stat().st_size,
            int8_bytes=small.stat().st_size,
        )


def relative_error(actual: 'list[Tensor] | tuple[Tensor, ...]', expected: 'tuple[Tensor, ...]') -> float:
    """Returns the norm of the error over the norm of the output, the largest of all outputs."""
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))

"""Exports the deployed part of a model as an ONNX file and checks it with onnxruntime."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..core import InputError
from ..core.files.atomic import check_output, write_file
from ..core.utils.randomness import random_images
from .arguments import at_least
from .errors import ConfigError, config_name, is_from_user
from .images import backbone_arguments, image_channels
from .model import open_model

TOLERANCE = 1e-4
"""Largest relative difference of onnxruntime and torch in float32: maximum difference over maximum output."""


def export_file(
    cfg: Config,
    checkpoint: str | Path,
    target: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    dynamic_batch: bool = False,
    dynamo: bool = False,
    overwrite: bool = False,
) -> dict[int, float]:
    """Writes the deployed part of a model as an ONNX file; writes nothing if onnxruntime and torch differ.

    Args:
        cfg: Config of the model, with or without denoising.
        checkpoint: Path of a fused or vanilla checkpoint.
        target: File to write; its name ends with ``.onnx``.
        size: Height and width of the images in pixels; None takes ``img_size`` of the backbone, or 224.
        dynamic_batch: Whether the file takes any batch size; otherwise it takes one image.
        dynamo: Whether to use the exporter based on ``torch.export``.
        overwrite: Whether the target may exist.

    Returns:
        Largest relative difference of onnxruntime and torch by batch size.

    Raises:
        InputError: The file can't be written, the checkpoint does not fit or has denoisers, or the model can't be
            exported.

    Examples:
        >>> cfg = load_config('configs/demo/resnet_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'resnet.pth')
        >>> export_file(cfg, 'resnet.pth', 'resnet.onnx', size=(28, 28))[1] < 1e-4
        True
    """
    check_output(Path(target), overwrite, suffix='.onnx')
    model = Deployed(open_model(cfg, checkpoint, denoisers='refuse')[0])
    shape = image_shape(cfg, model, size)
    differences = {}
    with tempfile.TemporaryDirectory() as folder:  # exporters need a path
        temporary = Path(folder, 'model.onnx')
        runs = False
        try:
            with torch.no_grad():
                model(random_images((1, *shape), seed=1))
            runs = True
            export_onnx(model, shape, temporary, dynamic_batch, dynamo)
            for batch in (1, 2, 3) if dynamic_batch else (1,):
                images = random_images((batch, *shape), seed=batch)
                with torch.no_grad():
                    differences[batch] = largest_difference(run_onnx(temporary, images), model(images))
                if differences[batch] > TOLERANCE:
                    raise ValueError(
                        f'onnxruntime differs from torch by {differences[batch]:.1e}, more than {TOLERANCE:.0e}'
                    )
        except Exception as error:  # exporters and runtimes fail in many ways
            if not runs and is_from_user(error):
                raise  # a bug in the user's own model: they want the traceback
            how = 'with a dynamic batch; leave that out, for one image' if dynamic_batch else 'for one image'
            reason = re.split(r'\n|\. ', str(error).strip())[0]
            raise ConfigError(
                f'{config_name(cfg)} cannot be exported {how} {shape} ({type(error).__name__}: {reason})'
            ) from error
        with write_file(Path(target)) as file:
            file.write(temporary.read_bytes())
    return differences


class Deployed(nn.Module):
    """The deployed part of a model, in eval mode.

    Args:
        model: A classifier or segmentor, which is deployed up to its logits (``mode='tensor'``), or a detector, whose
            backbone and neck are deployed; its heads need operators of mmcv.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.is_detector = any(kind.__name__ == 'BaseDetector' for kind in type(model).__mro__)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns logits, (N, ...), or feature maps, (N, C', H', W').

        Args:
            images: Preprocessed images, (N, C, H, W), float32.
        """
        output = self.model.extract_feat(images) if self.is_detector else self.model(images, mode='tensor')
        return tuple(_tensors(output))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def image_shape(cfg: Config, model: nn.Module, size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """Returns the shape (C, H, W) of the images; without a size, ``img_size`` of the backbone, or 224."""
    if size is None:
        size = backbone_arguments(cfg).get('img_size') or 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2:
        raise InputError(f'size must be a height and a width, got {size}')
    height, width = size
    at_least(1, height=height, width=width)
    return image_channels(cfg, model), height, width


def export_onnx(
    model: Deployed, shape: Sequence[int], path: Path, dynamic_batch: bool = False, dynamo: bool = False
) -> None:
    """Writes an ONNX file with the input ``images`` and the outputs ``output_0``, ``output_1``, ...

    Args:
        model: The module to export.
        shape: Shape (C, H, W) of the images.
        path: File to write.
        dynamic_batch: Whether the file takes any batch size; otherwise it takes one image.
        dynamo: Whether to use the exporter based on ``torch.export``.
    """
    batch = 2 if dynamic_batch else 1
    images = random_images((batch, *shape), seed=batch)
    with torch.no_grad(), warnings.catch_warnings(), _without_stderr():
        warnings.simplefilter('ignore')  # the tracer warns about every constant
        outputs = [f'output_{i}' for i in range(len(model(images)))]
        if dynamo:
            axes = dict(dynamic_shapes=({0: torch.export.Dim('batch')},) if dynamic_batch else None)
        else:
            axes = dict(dynamic_axes={name: {0: 'batch'} for name in ('images', *outputs)} if dynamic_batch else None)
        names = dict(input_names=['images'], output_names=outputs)
        torch.onnx.export(model, (images,), path, **names, **axes, dynamo=dynamo, external_data=False, verbose=False)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards stderr, to which the default exporter prints its whole graph at an unsupported operator."""
    torch._C._jit_set_onnx_log_output_stream('stderr')  # unbuffered, unlike stdout
    saved = os.dup(2)
    try:
        with open(os.devnull, 'wb') as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    """Returns the outputs of an ONNX file in onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(output) for output in session.run(None, dict(images=images.numpy()))]


def largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative difference of outputs: maximum difference over maximum expected value."""
    return max(
        ((a - e).abs().max() / e.abs().max()).nan_to_num(torch.inf).item()
        for a, e in zip(actual, expected, strict=True)
    )

"""Extracts the features of images with a re-identification model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from numpy.typing import NDArray
from tqdm import tqdm

from ..core import InputError
from ..engine.resume import allow_training_checkpoints
from .arguments import at_least, checkpoint_path
from .errors import config_at_fault, config_name, config_path, is_from_user
from .images import NoImage, open_images
from .model import build_model, to_device
from .weights import LoadingCheck


def extract_features(
    cfg: Config, checkpoint: str | Path, images: str | Path, *, batch_size: int = 64, device: str | None = None
) -> tuple[NDArray[np.float32], list[str]]:
    """Returns the features of all images in a folder, before normalisation.

    Args:
        cfg: Config with a re-identification head and a test pipeline.
        checkpoint: Path or URL of a checkpoint for the config.
        images: Folder of images; its subfolders are searched too.
        batch_size: Batch size.
        device: Device to compute on; None takes the GPU, or the CPU without one.

    Returns:
        The features, (N, C), float32; the sorted paths of the images, relative to the folder, with ``/``.

    Raises:
        InputError: The checkpoint or an image can't be used, or the model predicts no features, or not finite ones.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-reid.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> features, paths = extract_features(cfg, 'vit.pth', 'images', device='cpu')
        >>> features.shape
        (4, 96)
    """
    at_least(1, batch_size=batch_size)
    images = Path(images)
    if not os.path.isdir(images):  # False, too, for a name that is too long
        raise InputError(f'{images} is not a folder')
    checkpoint = checkpoint_path(checkpoint)
    model, missing = _open_model(cfg, checkpoint, device)
    with config_at_fault(config_path(cfg)):
        dataset = open_images(cfg, folder=images, model=model)
    features: list[Any] = []
    paths: list[str] = []
    for batch in tqdm(_batches(dataset, batch_size), total=-(-len(dataset) // batch_size), unit='batch'):
        paths += [path.relative_to(images).as_posix() for path in batch]
        if not batch:
            continue
        with config_at_fault(config_path(cfg)):
            features.append(_predict(model, pseudo_collate(list(batch.values())), config_name(cfg)))
        if not np.isfinite(features[-1]).all():
            reason = f': {checkpoint} has no {missing[0]}, {len(missing)} are missing' if missing else ''
            raise InputError(f'the features of {images / paths[-len(batch)]} and others are not finite{reason}')
    if not features:
        raise InputError(f'the config leaves out all images of {images}')
    return np.concatenate(features), paths


def _batches(dataset: Any, size: int) -> Iterator[dict[Path, Any]]:
    """Yields packed images by path; prints a sentence for each image that the config leaves out."""
    for start in range(0, len(dataset), size):
        batch = {}
        for i in range(start, min(start + size, len(dataset))):
            image = dataset[i]
            if not isinstance(image, NoImage):
                batch[Path(dataset.info(i)['img_path'])] = image
            elif image.left_out:
                print(image.sentence)
            else:
                raise InputError(image.sentence)
        yield batch


def _open_model(cfg: Config, checkpoint: str, device: str | None) -> tuple[Any, list[str]]:
    """Returns the model with the weights, in eval mode, and the names of the parameters that the checkpoint lacks.

    Missing parameters are NaN, so features that depend on them are NaN too. An unused classifier may be missing,
    BatchNorm statistics may not.
    """
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    allow_training_checkpoints()
    loading = LoadingCheck(model, checkpoint, 'features')
    try:
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent')
        loading.unwrap(content)
        loading.check_content(content)
        _load_checkpoint_to_model(model, content, logger='silent')
    except InputError:
        raise
    except Exception as error:  # addresses and files fail in many ways
        if is_from_user(error):
            raise
        raise InputError(f'{checkpoint} cannot be loaded ({type(error).__name__}: {error})') from error
    loading.check_model()
    to_device(model, device)
    return model, [name for name, parameter in model.named_parameters() if parameter.isnan().all()]


def _predict(model: Any, batch: dict[str, Any], config: str) -> Any:
    """Returns the features of a batch, (B, C), float32."""
    with torch.no_grad():
        samples = model.test_step(batch)
    features = [getattr(sample, 'pred_feature', None) for sample in samples]
    if any(feature is None for feature in features):
        raise InputError(f'the model of {config} predicts no pred_feature; it needs a head such as BNNeckReIDHead')
    return torch.stack(features).float().cpu().numpy()

"""Images for a model without their annotations: of a folder, or of a data set in a config."""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from common import test_dataset, type_name
from launch import stop
from mmdenoiserep.core.probe import image_channels

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def find_images(folder: Path) -> list[Path]:
    """Returns the paths of all images in a folder and the folders in it, sorted; none ends the program."""
    if not os.path.isdir(folder):
        stop(f'{folder} is not a folder')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
    if not paths:
        stop(f'{folder} has no images ({", ".join(SUFFIXES)})')
    if others := [path for path in paths if not path.is_file()]:  # a pipe would be waited for
        stop(f'{others[0]} is not a file; remove it, or rename it')
    return paths


def build_pipeline(cfg: Config, color_type: str = 'color') -> Compose:
    """Returns the test pipeline for paths of images: without annotations, with a step that loads where there is none.

    Args:
        cfg: The config.
        color_type: ``'color'`` or ``'grayscale'``, for that step; CUHK-03's and MNIST's pipelines start from arrays.
    """
    steps = _steps(cfg)
    if not any(type_name(step) == 'LoadImageFromFile' for step in steps):
        steps.insert(0, ConfigDict(type='LoadImageFromFile', color_type=color_type))
    return Compose(steps)


class Folder(Dataset):
    """Images of a folder, packed by the test pipeline.

    Args:
        cfg: The config.
        paths: The images.
        color_type: ``'color'`` or ``'grayscale'``.
    """

    def __init__(self, cfg: Config, paths: Sequence[Path], color_type: str = 'color') -> None:
        self.pipeline = build_pipeline(cfg, color_type)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        return _pack(self.pipeline, dict(img_path=str(self.paths[index]), img_id=index), self.paths[index])


class Unlabelled(Dataset):
    """Images of a data set in a config, packed by the test pipeline: no augmentation, no annotations.

    Args:
        cfg: The config.
        split: ``'train'``, ``'val'`` or ``'test'``.
    """

    def __init__(self, cfg: Config, split: str) -> None:
        if not cfg.get(f'{split}_dataloader'):
            stop(f'the config has no {split}_dataloader; name a folder with --images')
        self.pipeline = Compose(_steps(cfg))
        try:
            self.dataset = DATASETS.build(_without_pipeline(cfg[f'{split}_dataloader'].dataset))
        except Exception as error:  # data sets fail in many ways
            stop(f'the data set of {split}_dataloader cannot be read ({type(error).__name__}: {error})')

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        info = self.dataset.get_data_info(index)
        return _pack(self.pipeline, info, info.get('img_path', f'image {index} of the data set'))


def open_images(cfg: Config, backbone: nn.Module, folder: Path | None, split: str) -> Folder | Unlabelled:
    """Returns the images of a folder, grey ones for a backbone that takes one channel, or those of a data set."""
    if not folder:
        return Unlabelled(cfg, split)
    return Folder(cfg, find_images(folder), 'grayscale' if image_channels(backbone) == 1 else 'color')


class Batches:
    """Preprocessed images for a backbone, read anew in every pass.

    Args:
        model: The model, whose ``data_preprocessor`` normalises and pads.
        dataset: Packed images.
        batch_size: Images at a time; those of different sizes come one after the other.
        workers: Processes that read.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, batch_size: int, workers: int = 0) -> None:
        self.model = model
        self.dataset = dataset
        self.loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        for packed in self.loader:
            if sentences := [item for item in packed if isinstance(item, str)]:
                stop(sentences[0])
            for _, same in groupby(packed, lambda item: item['inputs'].shape):
                yield self.model.data_preprocessor(pseudo_collate(list(same)))['inputs']


def spread(dataset: Dataset, count: int, rank: int = 0, world: int = 1) -> Subset:
    """Returns ``count`` images, evenly over a data set that may be sorted by class, and of them one process's share."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = np.linspace(0, total, min(count, total), endpoint=False).astype(int)
    return Subset(dataset, chosen[rank::world].tolist())


def _steps(cfg: Config) -> list[ConfigDict]:
    steps = map(ConfigDict, test_dataset(cfg).get('pipeline', []))
    return [step for step in steps if not re.match('Load(?!Image)', type_name(step))]


def _without_pipeline(dataset: ConfigDict) -> ConfigDict:
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'datasets' in dataset:
        return ConfigDict(dataset, datasets=list(map(_without_pipeline, dataset.datasets)))
    return ConfigDict(dataset, pipeline=[])


def _pack(pipeline: Compose, info: dict[str, Any], name: str | Path) -> dict[str, Any] | str:
    """Returns a packed image; or a sentence if it can't be read, which outlives a worker process."""
    try:
        return pipeline(info)
    except Exception as error:  # broken images fail in many ways
        return f'{name} cannot be read ({type(error).__name__}: {error})'

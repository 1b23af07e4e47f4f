"""Reads the images of a data set of a config, or of a folder, without annotations.

Images go through the config's own data set, wrappers and test pipeline. Transforms that load annotations are skipped.
Training images go through the test pipeline too, so they are not augmented. ``RepeatDataset`` yields each image once;
all other wrappers are kept.
"""

import contextlib
import copy
import inspect
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose as NestedCompose
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, Compose, RepeatDataset, pseudo_collate
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from ..core import InputError
from ..core.method import probe
from ..core.utils.errors import printable
from ..engine.backbone import CHANNELS
from .arguments import one_of
from .backbones import backbone_configs
from .errors import config_name, is_from_user
from .folders import SUFFIXES, find_images

ANNOTATIONS = {
    'FilterAnnotations',
    'LoadAnnotations',
    'LoadBiomedicalAnnotation',
    'LoadDepthAnnotation',
    'LoadEmptyAnnotations',
    'LoadProposals',
}
"""The transforms of the libraries that load only annotations; their subclasses count too."""
LIBRARIES = ('mmcv.', 'mmdet.', 'mmengine.', 'mmpretrain.', 'mmseg.')
COLOR_TYPES = {1: 'grayscale', 3: 'color', 4: 'unchanged'}
"""Input channels of the model: the ``color_type`` to read files with if no transform of the pipeline loads them."""
SPLITS = ('train', 'val', 'test')
"""Data sets of a config: ``<split>_dataloader``."""
RGB = 'CIFAR10'
"""The data set class of the libraries that gives RGB arrays; all others give BGR. Its subclasses count too."""
MAX_WAITING = 4
"""Largest number of batches that may wait until more images of their size come."""

Change = Callable[[np.ndarray, int], np.ndarray]
"""A function of a loaded image, (H, W, C) or (H, W), and its index; returns the image for the other transforms."""


@dataclass
class NoImage:
    """Placeholder for an image that can't be read; unlike an exception, it leaves a worker process unchanged.

    Attributes:
        sentence: Message that names the image and the reason.
        left_out: Whether the config's own pipeline or data set leaves the image out by returning None.
    """

    sentence: str
    left_out: bool = False


class _Missing(Exception):
    """Raised inside a data set instead of returning an image; ``image`` is None if there is no reason."""

    def __init__(self, image: NoImage | None = None) -> None:
        self.image = image


class _NotLoaded(_Missing):
    """Raised where no transform of a pipeline loads the image."""


@dataclass
class _Request:
    """The image that is being read, shared by all pipelines of a data set.

    Attributes:
        index: Index of the image.
        change: See :data:`Change`.
        only_load: Whether to stop as soon as the image is loaded.
    """

    index: int = 0
    change: Change | None = None
    only_load: bool = False


@dataclass
class _Pipeline:
    """A pipeline from the info of a data set, such as a path, to a packed image, without annotations.

    A transform of any name counts as the loading one if it adds ``img`` or ``inputs``.

    Attributes:
        steps: The transforms.
        request: The image that is being read.
        loader: Transform that is put first if the first image can't be packed without it.
    """

    steps: list[Callable]
    request: _Request
    loader: Callable | None = None

    def __call__(self, info: dict[str, Any]) -> Any:
        """Returns the packed image.

        Raises:
            _Missing: The image can't be read, or is left out.
        """
        if self.loader is None:
            return self._run(info, self.steps)
        steps = self.steps
        try:
            results = self._run(dict(info), steps)
        except Exception as error:  # without a loaded image a transform may fail in any way
            if isinstance(error, _Missing) and (error.image is None or error.image.left_out):
                raise
            failure = error
            steps = [self.loader, *steps]
            results = None
        if results is None:
            try:
                results = self._run(dict(info), steps)
            except Exception:
                if isinstance(failure, _NotLoaded):
                    raise
            if results is None:
                raise failure  # the loader does not help
        self.steps, self.loader = steps, None
        return results

    def _run(self, results: Any, steps: Sequence[Callable]) -> Any:
        name = results.get('img_path', f'image {self.request.index} of the data set')
        loaded = _has_image(results)
        if loaded:
            results = self._change(results, name)
        for step in steps:
            if loaded and self.request.only_load:
                break
            if _loads_annotations(step) and (loaded or _is_of_library(step)):
                continue
            try:
                results = step(results)
            except Exception as error:  # the steps of the libraries fail in many ways
                is_file = not loaded and (isinstance(error, OSError) or _is_broken(name))
                if is_from_user(error) and not is_file:
                    raise  # a bug in the user's own transform: they want the traceback
                what = f'is refused by {type(step).__name__}' if loaded else 'cannot be read'
                raise _Missing(NoImage(f'{name} {what} ({type(error).__name__}: {error})')) from None
            if results is None:
                raise _Missing(NoImage(f'{name} is left out by {type(step).__name__}', left_out=True))
            if not loaded and _has_image(results):
                loaded = True
                results = self._change(results, name)
        if not loaded:
            raise _NotLoaded(
                NoImage(f'{name} is loaded by no step of the pipeline; add one that loads and one that packs')
            )
        return results

    def _change(self, results: dict[str, Any], name: str) -> dict[str, Any]:
        if self.request.change is None:
            return results
        if not isinstance(results.get('img'), np.ndarray):
            kind = f'img is a {type(results["img"]).__name__}' if 'img' in results else 'there is no img'
            raise _Missing(NoImage(f'{name} can only be changed as an array under img ({kind})'))
        try:
            return results | dict(img=self.request.change(results['img'], self.request.index))
        except InputError as error:
            raise _Missing(NoImage(f'{name}: {error}')) from None


class Images(Dataset):
    """Packed images of a data set, without annotations and augmentation.

    Indexing gives a dict with ``inputs``, a (C, H, W) tensor, and ``data_samples``; or a :class:`NoImage`.

    Args:
        dataset: Data set of packed images, through a :class:`_Pipeline` or by its own code.
        request: The request that its pipelines share.
        what: Name of the data set, for messages.

    Attributes:
        is_rgb: Whether the channels of a loaded image are in RGB order, not BGR.

    Raises:
        InputError: The data set is empty.
    """

    def __init__(self, dataset: Any, request: _Request, what: str) -> None:
        if not len(dataset):
            raise InputError(f'{what} is empty')
        self.dataset = dataset
        self.request = request
        self.what = what
        self.change: Change | None = None
        self.is_rgb = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | NoImage:
        packed = self._read(index, only_load=False)
        if isinstance(packed, NoImage):
            return packed
        inputs = packed.get('inputs') if isinstance(packed, dict) else None
        if isinstance(inputs, Tensor):
            return packed
        kind = type(packed).__name__ if inputs is None else f'inputs that are a {type(inputs).__name__}'
        several = '; a pipeline for test-time augmentation makes several images of one' * isinstance(inputs, list)
        return NoImage(
            f'image {index} of {self.what} comes as {kind}, not as a dict with a tensor under inputs: '
            f'end the pipeline with a step that packs, such as PackInputs{several}'
        )

    def load(self, index: int) -> np.ndarray:
        """Returns a loaded image before all other transforms, (H, W, C) or (H, W), in the dtype of the file.

        Raises:
            InputError: The image can't be read, or the config leaves it out.
        """
        results = self._read(index, only_load=True)
        if isinstance(results, NoImage):
            raise InputError(results.sentence)
        if not isinstance(results, dict) or not isinstance(results.get('img'), np.ndarray):
            raise InputError(f'image {index} of {self.what} is loaded by no step of a pipeline as an array under img')
        return results['img']

    def info(self, index: int) -> dict[str, Any]:
        """Returns the info of an image (``img_path``, ``gt_label``, ...); empty if the data set has none."""
        return _info(self.dataset, index)

    def after_loading(self, change: Change) -> 'Images':
        """Returns the same images, each changed right after loading by ``change(image, index)``.

        Raises:
            InputError: The data set has no pipeline.
        """
        if not any(isinstance(value, _Pipeline) for part in _parts(self.dataset) for value in vars(part).values()):
            raise InputError(
                f'{self.what} ({type(self.dataset).__name__}) has no pipeline, so its images cannot be changed'
            )
        changed = copy.copy(self)
        changed.change = change
        return changed

    def _read(self, index: int, only_load: bool) -> Any:
        self.request.index, self.request.change, self.request.only_load = index, self.change, only_load
        image = None
        try:
            image = self.dataset[index]
        except _Missing as missing:
            image = missing.image
        if image is None:
            name = self.info(index).get('img_path', f'image {index} of {self.what}')
            return NoImage(f'{name} is left out by the data set', left_out=True)
        return image


class FolderImages(Images):
    """Image files, packed by the test pipeline of a config.

    Args:
        cfg: The config.
        paths: Paths of the files.
        color_type: ``'color'``, ``'grayscale'`` or ``'unchanged'``: how to load a file if no transform of the pipeline
            does (the data sets of CUHK-03 and MNIST start from arrays); None refuses such a pipeline.
    """

    def __init__(self, cfg: Config, paths: Sequence[Path], color_type: str | None = 'color') -> None:
        request = _Request()
        with _scope(cfg):
            is_rgb = all(map(_gives_rgb, _test_datasets(cfg)))
            loader = _FileLoader(color_type, is_rgb) if color_type else None
            pipeline = _Pipeline(_test_steps(cfg), request, loader)
        super().__init__(_Files(paths, pipeline), request, 'the folder')
        self.is_rgb = is_rgb


class _FileLoader(LoadImageFromFile):
    """Loads a file with the channel order of the test data set's arrays."""

    def __init__(self, color_type: str, is_rgb: bool) -> None:
        super().__init__(color_type=color_type)
        self.is_rgb = is_rgb

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        loaded = super().transform(results)
        if self.is_rgb and loaded and loaded['img'].shape[2:] == (3,):
            loaded['img'] = np.ascontiguousarray(loaded['img'][..., ::-1])
        return loaded


class _Files:
    def __init__(self, paths: Sequence[Path], pipeline: _Pipeline) -> None:
        self.paths = paths
        self.pipeline = pipeline

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.pipeline(self.get_data_info(index))

    def get_data_info(self, index: int) -> dict[str, Any]:
        return dict(img_path=str(self.paths[index]), img_id=index, sample_idx=index)


class DatasetImages(Images):
    """Images of a data set of a config; training images go through the test pipeline.

    Args:
        cfg: The config.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        InputError: The config has no such data set, or it can't be read, or is empty.
    """

    def __init__(self, cfg: Config, split: str) -> None:
        what = f'the data set of {split}_dataloader in {config_name(cfg)}'
        request = _Request()
        with _scope(cfg):
            configs = datasets_of(cfg, split)
            steps = _test_steps(cfg) if split == 'train' else None
            parts = [_build(config, steps, request, what) for config in configs]
            is_rgb = all(map(_gives_rgb, configs))
        super().__init__(parts[0] if len(parts) == 1 else ConcatDataset(parts), request, what)
        self.is_rgb = is_rgb


def open_images(
    cfg: Config,
    split: str = 'test',
    folder: str | Path | None = None,
    model: nn.Module | None = None,
    after_loading: Change | None = None,
) -> Images:
    """Returns the images of a data set or a folder, packed by the test pipeline of a config, without annotations.

    Args:
        cfg: The config.
        split: Data set of the config: ``'train'``, ``'val'`` or ``'test'``.
        folder: Folder of images to read instead of the data set; its subfolders are searched too.
        model: Model that takes the images; its number of channels decides how the files of a folder are read if no
            transform of the test pipeline loads them. None means 3 channels.
        after_loading: Function that changes every image right after loading, see :data:`Change`.

    Returns:
        A data set of dicts with ``inputs``, a (C, H, W) tensor, and ``data_samples``.

    Raises:
        InputError: There are no images, they can't be read, or the config has no single test pipeline.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> images = open_images(cfg, 'train')
        >>> images[0]['inputs'].shape
        torch.Size([1, 28, 28])
    """
    images: Images
    one_of(SPLITS, split=split)
    if folder is None:
        images = DatasetImages(cfg, split)
    else:
        channels = image_channels(cfg, model) if model else 3
        images = FolderImages(cfg, find_images(Path(folder), _suffixes(cfg)), COLOR_TYPES.get(channels))
    return images.after_loading(after_loading) if after_loading else images


class Batches:
    """Batches of preprocessed images for a backbone, read again in every pass.

    Args:
        model: The model; its ``data_preprocessor`` normalises and pads.
        dataset: Packed images.
        batch_size: Largest number of images in a batch; all images of a batch have one size.
        workers: Number of reading processes; 0 reads in this process.

    Attributes:
        order: Indices of the images of the last pass, in the order of the batches.
        left_out: A sentence for each image that the config leaves out.
        what: What the images are, for messages.
    """

    def __init__(self, model: nn.Module, dataset: Subset, batch_size: int, workers: int = 0) -> None:
        self.preprocessor: Any = model.data_preprocessor
        self.dataset = dataset
        self.batch_size = batch_size
        self.loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list)
        self.order: list[int] = []
        self.left_out: dict[str, None] = {}
        self.what = 'image'

    def __iter__(self) -> Iterator[Tensor]:
        """Yields batches, (B, C, H, W).

        Raises:
            InputError: An image can't be read, or the config leaves out all images.
        """
        for packed in self.packed():
            images = self.preprocessor(packed)['inputs']
            if not isinstance(images, Tensor):  # self-supervised models take a list as the views of one image
                images = self.preprocessor(packed | dict(inputs=torch.stack(packed['inputs'])))['inputs']
            yield images

    def packed(self) -> Iterator[dict[str, Any]]:
        """Yields batches before the data preprocessor: dicts with lists under ``inputs`` and ``data_samples``.

        Raises:
            InputError: An image can't be read, or the config leaves out all images.
        """
        waiting: dict[tuple[int, ...], list[tuple[int, Any]]] = {}
        self.order = []
        number = -1
        for packed in self.loader:
            for item in packed:
                number += 1
                if isinstance(item, NoImage):
                    self._leave_out(item)
                    continue
                shape = tuple(item['inputs'].shape)
                waiting.setdefault(shape, []).append((number, item))
                if len(waiting[shape]) == self.batch_size:
                    yield self._collate(waiting.pop(shape))
                elif sum(map(len, waiting.values())) > MAX_WAITING * self.batch_size:
                    yield self._collate(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
        for same in waiting.values():
            yield self._collate(same)
        if not self.order:
            raise InputError(f'no {self.what} is left: {next(iter(self.left_out), "there is none")}')

    def take(self, count: int) -> None:
        """Keeps ``count`` images, spread over all, or all if there are no more; see :func:`take_spread`."""
        self._keep(take_spread(self.dataset, count).indices)

    def hold_out(self, count: int) -> 'Batches':
        """Returns batches of ``count`` images, spread over all as :func:`take_spread` does, and drops them here."""
        held = copy.copy(self)
        held.order, held.left_out, held.what = [], {}, 'held-out image'
        chosen = take_spread(self.dataset, count).indices
        held._keep(chosen)
        self._keep(sorted(set(range(len(self.dataset))).difference(chosen)))
        return held

    def _keep(self, kept: Sequence[int]) -> None:
        self.dataset = Subset(self.dataset.dataset, [self.dataset.indices[i] for i in kept])
        self.loader = DataLoader(self.dataset, self.batch_size, num_workers=self.loader.num_workers, collate_fn=list)

    def _leave_out(self, image: NoImage) -> None:
        if not image.left_out:
            raise InputError(image.sentence)
        if image.sentence not in self.left_out:
            self.left_out[image.sentence] = None
            print(printable(image.sentence), file=sys.stderr)

    def _collate(self, same: list[tuple[int, Any]]) -> dict[str, Any]:
        self.order += [number for number, _ in same]
        packed: Any = pseudo_collate([item for _, item in same])
        return packed


def take_spread(dataset: Dataset, count: int, rank: int = 0, world: int = 1) -> Subset:
    """Returns the share of one process in ``count`` images that are spread over a data set.

    The data set is cut into stretches of about equal length, and each gives a random image, always the same one. So a
    data set that is sorted by class is covered, and one that repeats a pattern, as four cameras for each person, is not
    met at the same place of it each time.

    Args:
        dataset: The data set.
        count: Number of images in all processes; a smaller data set gives all it has.
        rank: Rank of the process.
        world: Number of processes.
    """
    total = len(dataset)  # type: ignore[arg-type]
    cuts = np.linspace(0, total, min(count, total) + 1).astype(int)
    chosen = np.random.default_rng(0).integers(cuts[:-1], cuts[1:])
    return Subset(dataset, chosen[rank::world].tolist())


def image_channels(cfg: Config, model: nn.Module) -> int:
    """Returns the number of channels of a model's images.

    The first that is known of: ``in_channels`` of the backbone, in the config or by default; the length of the
    preprocessor's ``mean``, if it is more than 1; the input channels of the model's first convolution, up to 4; 3.
    """
    arguments = backbone_arguments(cfg)
    for key in CHANNELS:
        if isinstance(channels := arguments.get(key), int):
            return channels
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    mean = preprocessor.get('mean') or []
    return len(mean) if len(mean) > 1 else probe.image_channels(model)


def backbone_arguments(cfg: Config) -> dict[str, Any]:
    """Returns the arguments of the first backbone of a config, with defaults, without ``DenoiseRepBackbone``.

    Empty if the config calls no part a backbone (mmpretrain's retriever has its backbone in a list).
    """
    try:
        config = next(iter(backbone_configs(cfg.model).values()))
    except InputError:
        return {}
    while isinstance(config.get('backbone'), Mapping):  # it is a DenoiseRepBackbone
        config = config['backbone']
    kind = config['type']
    if isinstance(kind, str):
        with _scope(cfg), MODELS.switch_scope_and_registry(config.get('_scope_')) as registry:
            kind = registry.get(kind)
    given = inspect.signature(kind).parameters.items() if kind else ()
    return {name: p.default for name, p in given if p.default is not inspect.Parameter.empty} | dict(config)


def datasets_of(cfg: Config, split: str) -> list[Any]:
    """Returns the data sets of a split, each a config or a built object.

    Args:
        cfg: The config; its data loader may be a list, or built already.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        InputError: The config has no data set for the split.
    """
    loaders = cfg.get(f'{split}_dataloader')
    if not loaders:
        raise InputError(f'{config_name(cfg)} has no {split}_dataloader')
    datasets: list[Any] = []
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else getattr(loader, 'dataset', None)
        if dataset is None:
            raise InputError(f'the {split}_dataloader in {config_name(cfg)} has no dataset')
        datasets += dataset if isinstance(dataset, list | tuple) else [dataset]
    return datasets


def leaves(dataset: Any) -> Iterator[Any]:
    """Yields the data sets inside all wrappers of a data set: configs, or built objects."""
    inner = _inner(dataset)
    if not inner:
        yield dataset
    for part in inner:
        yield from leaves(part)


def _inner(dataset: Any) -> list[Any]:
    """Returns the data sets that the config of a data set, or a built data set, wraps."""
    return [
        part for parts in _wrapped(dataset).values() for part in (parts if isinstance(parts, list | tuple) else [parts])
    ]


def _wrapped(dataset: Any) -> dict[str, Any]:
    """Returns the wrapped data sets by key or attribute: each a data set, or a list of data sets."""
    if isinstance(dataset, dict):
        values, is_one = {key: value for key, value in dict.items(dataset) if key != 'pipeline'}, _is_config
    else:
        values, is_one = getattr(dataset, '__dict__', {}), _is_built
    return {
        key: value
        for key, value in values.items()
        if (value and all(map(is_one, value)) if isinstance(value, list | tuple) else is_one(value))
    }


def _is_config(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_built(value)
    kind = _kind(value)
    return kind is not None and ('pipeline' in value or bool(_wrapped(value)) or _is_kind(kind))


def _kind(config: dict[str, Any]) -> Any:
    """Returns the class that the config of a data set builds; None if no registry has it."""
    kind = config.get('type')  # lazy configs hold the class
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(config.get('_scope_')) as registry:
            kind = registry.get(kind)
    return kind


def _is_built(value: Any) -> bool:
    return not isinstance(value, type) and _is_kind(type(value))


def _is_kind(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Dataset) or hasattr(kind, 'get_data_info'))


def describe_preprocessing(cfg: Config, model: nn.Module) -> dict[str, str]:
    """Returns what turns a loaded image into an input of the model, as text: moments depend on it.

    These are the settings of the data preprocessor and the steps of the test pipeline between loading and packing. A
    config with several test pipelines has no such steps.
    """
    preprocessor: Any = model.data_preprocessor
    settings = {
        **vars(preprocessor),
        **{name: value.flatten().tolist() for name, value in preprocessor.named_buffers()},
    }
    about = {
        f'data_preprocessor.{"bgr_to_rgb" if name == "_channel_conversion" else name}': str(value)
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str | list) and name != 'training'
    }
    try:
        steps = _test_steps(cfg)
    except InputError:
        return about
    texts = [f'{type(step).__name__} {re.sub(" at 0x[0-9a-f]+", "", repr(step))}' for step in steps]
    kept = [text for text in texts if not re.match(r'(Load|Pack|\w*Inputs\b)', text)]
    return about | {'pipeline': '; '.join(kept)}


def _test_datasets(cfg: Config) -> list[Any]:
    return datasets_of(cfg, 'test' if cfg.get('test_dataloader') or not cfg.get('val_dataloader') else 'val')


def _test_steps(cfg: Config) -> list[Callable]:
    """Returns the transforms of the test pipeline, which all test data sets of a config share.

    Raises:
        InputError: There is no pipeline, or there are several.
    """
    datasets = _test_datasets(cfg)
    found: list[Any] = []
    for steps in (steps for dataset in datasets for steps in _pipelines(dataset, cfg)):
        if steps not in found:
            found.append(steps)
    if len(found) > 1:
        kind = _name(datasets[0]) if len(datasets) == 1 else 'a list'
        raise InputError(
            f'the test data set of {config_name(cfg)} ({kind}) has parts with {len(found)} different pipelines, but '
            'other images need one; set test_dataloader.dataset to a single one'
        )
    return [TRANSFORMS.build(step) if isinstance(step, dict) else step for step in found[0]]


def _pipelines(dataset: Any, cfg: Config) -> Iterator[list[Any]]:
    """Yields the pipeline of each inner data set, followed by the pipelines of its wrappers."""
    own = _own_steps(dataset)
    inner = _inner(dataset)
    if not inner and own is None and isinstance(dataset, dict):
        own = _own_steps(DATASETS.build(dataset))
    if not inner:
        if own is None:
            raise InputError(f'the test data set ({_name(dataset)}) in {config_name(cfg)} has no pipeline')
        yield own
    for part in inner:
        for steps in _pipelines(part, cfg):
            yield steps + (own or [])


def _own_steps(dataset: Any) -> list[Any] | None:
    if isinstance(dataset, dict):
        pipeline = dataset.get('pipeline')
    else:
        pipeline = getattr(dataset, _pipeline_name(dataset) or '', None)
    if pipeline is None:
        return None
    pipeline = getattr(pipeline, 'transforms', pipeline)
    return list(pipeline) if isinstance(pipeline, list | tuple) else [pipeline]


def _pipeline_name(dataset: Any) -> str | None:
    """Returns the attribute of a built data set that holds its pipeline."""
    if hasattr(dataset, 'pipeline'):
        return 'pipeline'
    values = getattr(dataset, '__dict__', {}).items()
    return next((name for name, value in values if isinstance(value, Compose | NestedCompose)), None)


def _build(dataset: Any, steps: list[Callable] | None, request: _Request, what: str) -> Any:
    """Returns a data set in which every inner data set has a :class:`_Pipeline`.

    Args:
        dataset: A config, or a built data set, which is not changed.
        steps: Transforms of the pipelines, which replace those of the wrappers too; None keeps the data set's own.
        request: The request that the pipelines share.
        what: Name of the data set, for messages.
    """
    if isinstance(dataset, dict):
        try:
            with _separate_copies():
                dataset = DATASETS.build(_once(dataset, with_steps=steps is None))
                for part in _parts(dataset):
                    getattr(part, 'full_init', lambda: None)()
        except Exception as error:  # data sets fail in many ways
            if 'at least one array to concatenate' in str(error):
                raise InputError(f'{what} is empty: its annotations name no image, or its filter leaves none') from None
            if is_from_user(error) and not isinstance(error, OSError):
                raise
            raise InputError(f'{what} cannot be read ({type(error).__name__}: {error})') from None
    while isinstance(dataset, RepeatDataset):
        dataset = dataset.dataset
    return _with_pipeline(dataset, steps, request)


@contextlib.contextmanager
def _separate_copies() -> Iterator[None]:
    """Gives each copy that ``BaseDataset.get_subset`` makes, as for ``KFoldDataset``, a memo of its own.

    mmengine (0.10.7) has one memo for all copies of a process, the default argument of ``_copy_without_annotation``.
    Ids of data sets stay in it when they are gone. A new pipeline with such an id is then "copied" to a data set.
    """
    shared = BaseDataset._copy_without_annotation
    BaseDataset._copy_without_annotation = lambda self: shared(self, {})
    try:
        yield
    finally:
        BaseDataset._copy_without_annotation = shared


def _once(dataset: Any, with_steps: bool) -> Any:
    """Returns the config of a data set without ``RepeatDataset``, and if asked with empty pipelines."""
    if isinstance(dataset, list | tuple):
        return type(dataset)(_once(part, with_steps) for part in dataset)
    if not isinstance(dataset, dict):
        return dataset
    inner = {key: _once(value, with_steps) for key, value in _wrapped(dataset).items()}
    if _name(dataset).rpartition('.')[2] == RepeatDataset.__name__:
        return inner['dataset']
    return ConfigDict(dataset, **inner, **({} if with_steps or 'pipeline' not in dataset else dict(pipeline=[])))


def _with_pipeline(dataset: Any, steps: list[Callable] | None, request: _Request) -> Any:
    """Returns a copy of a built data set with other pipelines, see :func:`_build`."""
    if isinstance(dataset, list | tuple):
        return type(dataset)(_with_pipeline(part, steps, request) for part in dataset)
    new = copy.copy(dataset)
    inner = _wrapped(dataset)
    for name, value in inner.items():
        setattr(new, name, _with_pipeline(value, steps, request))
    pipeline, own = _pipeline_name(dataset), _own_steps(dataset)
    if pipeline is None or own is None:
        return new
    if inner:
        if steps is not None:
            setattr(new, pipeline, [])
        return new
    setattr(new, pipeline, _Pipeline(own if steps is None else steps, request))
    if hasattr(new, 'prepare_data'):  # where it returns None, mmengine's data sets take another image
        new.prepare_data = partial(_prepare, new.prepare_data)
    return new


def _prepare(prepare_data: Callable, index: int) -> Any:
    if (packed := prepare_data(index)) is None:
        raise _Missing
    return packed


def _parts(dataset: Any) -> Iterator[Any]:
    """Yields a built data set and all data sets in it."""
    yield dataset
    for part in _inner(dataset):
        yield from _parts(part)


def _info(dataset: Any, index: int) -> dict[str, Any]:
    if hasattr(dataset, 'get_data_info'):
        return dataset.get_data_info(index)
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        return _info(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    return {}


def _suffixes(cfg: Config) -> tuple[str, ...]:
    """Returns the usual suffixes of image files and those of the test data sets, in lower case."""
    found = list(SUFFIXES)
    with _scope(cfg):
        for leaf in (leaf for dataset in _test_datasets(cfg) for leaf in leaves(dataset)):
            for key in ('img_suffix', 'extensions'):
                named = _argument(leaf, key)
                found += [named] if isinstance(named, str) else named or ()
    return tuple(dict.fromkeys(suffix.lower() for suffix in found))


def _argument(leaf: Any, key: str) -> Any:
    """Returns an argument of a data set, from its config or the built object, or the default of its class."""
    if not isinstance(leaf, dict):
        return getattr(leaf, key, None)
    if leaf.get(key) is not None:
        return leaf[key]
    kind = _kind(leaf)
    if isinstance(kind, type) and issubclass(kind, BaseDataset):  # its class may pass it to the base class
        with contextlib.suppress(Exception):  # then the default in the signature counts
            return getattr(DATASETS.build(dict(leaf, lazy_init=True, pipeline=[])), key, None)
    parameters = inspect.signature(kind).parameters if kind else {}
    return parameters[key].default if key in parameters else None


def _gives_rgb(dataset: Any) -> bool:
    kinds = [_kind(leaf) if isinstance(leaf, dict) else type(leaf) for leaf in leaves(dataset)]
    return all(any(base.__name__ == RGB for base in getattr(kind, '__mro__', ())) for kind in kinds)


def _name(dataset: Any) -> str:
    kind = dataset.get('type', '') if isinstance(dataset, dict) else type(dataset)
    return getattr(kind, '__name__', str(kind))


def _has_image(results: Any) -> bool:
    """Whether results hold an image, not only its path."""
    found = [results.get('img'), results.get('inputs')] if isinstance(results, dict) else []
    return any(value is not None and not isinstance(value, str | os.PathLike) for value in found)


def _is_of_library(step: Callable) -> bool:
    return type(step).__module__.startswith(LIBRARIES)


def _loads_annotations(step: Callable) -> bool:
    return any(base.__name__ in ANNOTATIONS and base.__module__.startswith(LIBRARIES) for base in type(step).__mro__)


def _is_broken(path: Any) -> bool:
    """Whether a file is missing, empty, or an image that can't be decoded."""
    if not isinstance(path, str) or '://' in path:
        return False
    if not os.path.isfile(path) or not os.path.getsize(path):
        return True
    if not path.lower().endswith(SUFFIXES):
        return False
    try:
        return mmcv.imfrombytes(Path(path).read_bytes(), flag='unchanged') is None
    except Exception:  # decoders fail in many ways
        return True


def _scope(cfg: Config) -> Any:
    return DefaultScope.overwrite_default_scope(cfg.get('default_scope'))

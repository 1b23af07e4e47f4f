"""Images of a config without their annotations: of one of its data sets, or of a folder.

Every image takes the config's own way to the model: its data sets with what wraps them, its loading step, its test
pipeline. Left out are the steps that load annotations, and for training images the augmentation: they go through the
test pipeline. ``RepeatDataset`` counts each image once; every other wrapper keeps its images as they are.
"""

import contextlib
import copy
import inspect
import os
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
from .backbones import backbone_configs
from .errors import is_from_user
from .folders import SUFFIXES, find_images

ANNOTATIONS = {
    'FilterAnnotations',
    'LoadAnnotations',
    'LoadBiomedicalAnnotation',
    'LoadDepthAnnotation',
    'LoadEmptyAnnotations',
    'LoadProposals',
}
"""The steps of the libraries that load nothing but annotations; what inherits from one counts as well."""
LIBRARIES = ('mmcv.', 'mmdet.', 'mmengine.', 'mmpretrain.', 'mmseg.')
COLOR_TYPES = {1: 'grayscale', 3: 'color', 4: 'unchanged'}
"""How a file is read for a model that takes so many channels, where no step of the pipeline loads."""
RGB = 'CIFAR10'
"""The data set of the libraries, with those that inherit from it, which brings arrays in RGB order, not BGR."""
HELD = 4
"""Batches of images of other sizes that wait for more of their size, at most."""

Change = Callable[[np.ndarray, int], np.ndarray]
"""Takes an image as it was loaded, (H, W, C) or (H, W), and its number; returns what the pipeline goes on with."""


@dataclass
class NoImage:
    """Stands for an image that could not be had; it comes out of a worker process as it is, unlike an exception.

    Attributes:
        sentence: Names the image and says why.
        left_out: Whether the config's own pipeline or data set leaves it out, by returning None.
    """

    sentence: str
    left_out: bool = False


class _Missing(Exception):
    """Leaves a data set in place of an image; None if the data set left it out without a reason."""

    def __init__(self, image: NoImage | None = None) -> None:
        self.image = image


class _NotLoaded(_Missing):
    """Says that no step of a pipeline loads an image."""


@dataclass
class _Reading:
    """What is being read, for all pipelines of a data set.

    Attributes:
        index: Number of the image.
        change: See :data:`Change`.
        only_load: Whether to stop when the image is loaded.
    """

    index: int = 0
    change: Change | None = None
    only_load: bool = False


@dataclass
class _Pipeline:
    """Steps of a config from a path, or from what a data set brings, to a packed image, without annotations.

    A step loads the image if ``img`` or ``inputs`` is there after it and was not before: its name does not matter.

    Attributes:
        steps: The steps.
        reading: See there.
        loader: Is put in front, at the first image, if nothing comes out without it.
    """

    steps: list[Callable]
    reading: _Reading
    loader: Callable | None = None

    def __call__(self, info: dict[str, Any]) -> Any:
        """Returns the packed image; raises :class:`_Missing` if it can't be read or is left out."""
        if self.loader is None:
            return self._run(info, self.steps)
        steps = self.steps
        try:
            results = self._run(dict(info), steps)
        except Exception as error:  # a step that wants an image, where none loads one, may fail in any way
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
                raise failure  # the loader in front is no remedy
        self.steps, self.loader = steps, None
        return results

    def _run(self, results: Any, steps: Sequence[Callable]) -> Any:
        name = results.get('img_path', f'image {self.reading.index} of the data set')
        loaded = _has_image(results)
        if loaded:
            results = self._change(results, name)
        for step in steps:
            if loaded and self.reading.only_load:
                break
            if _loads_annotations(step) and (loaded or _is_of_library(step)):
                continue
            try:
                results = step(results)
            except Exception as error:  # the steps of the libraries fail in many ways
                is_file = not loaded and (isinstance(error, OSError) or _is_broken(name))
                if is_from_user(error) and not is_file:
                    raise  # a slip in the user's own step: they want the traceback
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
        if self.reading.change is None:
            return results
        if not isinstance(results.get('img'), np.ndarray):
            kind = f'img is a {type(results["img"]).__name__}' if 'img' in results else 'there is no img'
            raise _Missing(NoImage(f'{name} is loaded as no array that could be changed ({kind}); load one under img'))
        try:
            return results | dict(img=self.reading.change(results['img'], self.reading.index))
        except InputError as error:
            raise _Missing(NoImage(f'{name}: {error}')) from None


class Images(Dataset):
    """Packed images of a data set, without annotations and augmentation.

    Args:
        dataset: Gives them by number, through a :class:`_Pipeline` or as its own code packs them.
        reading: That of its pipelines.
        what: What they are images of, for messages.

    Attributes:
        is_rgb: Whether three channels are in RGB order after loading, not BGR.
    """

    def __init__(self, dataset: Any, reading: _Reading, what: str) -> None:
        if not len(dataset):
            raise InputError(f'{what} is empty')
        self.dataset = dataset
        self.reading = reading
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
        """Returns an image as its loading step gives it, (H, W, C) or (H, W).

        Raises:
            InputError: It can't be read, or is left out.
        """
        results = self._read(index, only_load=True)
        if isinstance(results, NoImage):
            raise InputError(results.sentence)
        if not isinstance(results, dict) or not isinstance(results.get('img'), np.ndarray):
            raise InputError(f'image {index} of {self.what} is loaded by no step of a pipeline as an array under img')
        return results['img']

    def info(self, index: int) -> dict[str, Any]:
        """Returns what the data set knows of an image (``img_path``, ``gt_label`` ...); empty where it can't say."""
        return _info(self.dataset, index)

    def after_loading(self, change: Change) -> 'Images':
        """Returns the same images, each changed right after it was loaded: ``change(image, index)``.

        Raises:
            InputError: The data set has no pipeline, in which that could be done.
        """
        if not any(isinstance(value, _Pipeline) for part in _parts(self.dataset) for value in vars(part).values()):
            raise InputError(
                f'{self.what} ({type(self.dataset).__name__}) has no pipeline, so nothing can be put in it'
            )
        changed = copy.copy(self)
        changed.change = change
        return changed

    def _read(self, index: int, only_load: bool) -> Any:
        self.reading.index, self.reading.change, self.reading.only_load = index, self.change, only_load
        image = None
        try:
            image = self.dataset[index]
        except _Missing as missing:
            image = missing.image
        if image is None:
            name = self.info(index).get('img_path', f'image {index} of {self.what}')
            return NoImage(f'{name} is left out by the data set', left_out=True)
        return image


class Folder(Images):
    """Images of files, packed by the test pipeline of a config.

    Args:
        cfg: The config.
        paths: The files.
        color_type: How they are read where no step of the pipeline does it (CUHK-03's and MNIST's start from arrays):
            ``'color'``, ``'grayscale'``, ``'unchanged'``; None refuses that.
    """

    def __init__(self, cfg: Config, paths: Sequence[Path], color_type: str | None = 'color') -> None:
        reading = _Reading()
        with _scope(cfg):
            datasets = _test_datasets(cfg)
            is_rgb = all(map(_brings_rgb, datasets))
            loader = _FileLoader(color_type, is_rgb) if color_type else None
            pipeline = _Pipeline(_steps_of(datasets), reading, loader)
        super().__init__(_Files(paths, pipeline), reading, 'the folder')
        self.is_rgb = is_rgb


class _FileLoader(LoadImageFromFile):
    """Loads a file as the arrays of the test data set are, in their order of colours."""

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


class Unlabelled(Images):
    """Images of a data set in a config: those for tests through their own pipeline, the training images as them.

    Args:
        cfg: The config.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        InputError: There is no such data set, it can't be read, or is empty.
    """

    def __init__(self, cfg: Config, split: str) -> None:
        what = f'the data set of {split}_dataloader'
        reading = _Reading()
        with _scope(cfg):
            configs = datasets_of(cfg, split)
            steps = _steps_of(_test_datasets(cfg)) if split == 'train' else None
            parts = [_build(config, steps, reading, what) for config in configs]
            is_rgb = all(map(_brings_rgb, configs))
        super().__init__(parts[0] if len(parts) == 1 else ConcatDataset(parts), reading, what)
        self.is_rgb = is_rgb


def open_images(
    cfg: Config,
    split: str = 'test',
    folder: Path | None = None,
    model: nn.Module | None = None,
    after_loading: Change | None = None,
) -> Images:
    """Returns the images of a config, without annotations.

    Args:
        cfg: The config.
        split: Which of its data sets: ``'train'``, ``'val'`` or ``'test'``.
        folder: A folder of images instead, read as the test pipeline of the config reads.
        model: The model, whose channels a folder is read in where no step of that pipeline loads.
        after_loading: Changes every image right after it was loaded, see :data:`Change`.

    Raises:
        InputError: There are no such images, or the config has no way to them.
    """
    images: Images
    if folder is None:
        images = Unlabelled(cfg, split)
    else:
        channels = image_channels(cfg, model) if model else 3
        images = Folder(cfg, find_images(folder, _suffixes(cfg)), COLOR_TYPES.get(channels))
    return images.after_loading(after_loading) if after_loading else images


class Batches:
    """Preprocessed images for a backbone, read anew in every pass.

    Args:
        model: The model, whose ``data_preprocessor`` normalises and pads.
        dataset: Packed images.
        batch_size: Images of one size at a time.
        workers: Processes that read.

    Attributes:
        order: Numbers in the data set of the images that the last pass gave, in its order: those of one size come
            together.
        left_out: A sentence for each image that the config leaves out.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, batch_size: int, workers: int = 0) -> None:
        self.preprocessor: Any = model.data_preprocessor
        self.dataset = dataset
        self.batch_size = batch_size
        self.loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list)
        self.order: list[int] = []
        self.left_out: dict[str, None] = {}

    def __iter__(self) -> Iterator[Tensor]:
        """Yields batches, (B, C, H, W).

        Raises:
            InputError: An image can't be read, or all are left out.
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
                    yield self._batch(waiting.pop(shape))
                elif sum(map(len, waiting.values())) > HELD * self.batch_size:
                    yield self._batch(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
        for same in waiting.values():
            yield self._batch(same)
        if not self.order:
            raise InputError(f'no image is left: {next(iter(self.left_out), "there is none")}')

    def _leave_out(self, image: NoImage) -> None:
        if not image.left_out:
            raise InputError(image.sentence)
        if image.sentence not in self.left_out:
            self.left_out[image.sentence] = None
            print(printable(image.sentence), file=sys.stderr)

    def _batch(self, same: list[tuple[int, Any]]) -> Tensor:
        self.order += [number for number, _ in same]
        packed: Any = pseudo_collate([item for _, item in same])
        images = self.preprocessor(packed)['inputs']
        if not isinstance(images, Tensor):  # that of self-supervised models takes a list for views of one image
            images = self.preprocessor(packed | dict(inputs=torch.stack(packed['inputs'])))['inputs']
        return images


def spread(dataset: Dataset, count: int, rank: int = 0, world: int = 1) -> Subset:
    """Returns ``count`` images, evenly over a data set that may be sorted by class, and of them one process's share."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = np.linspace(0, total, min(count, total), endpoint=False).astype(int)
    return Subset(dataset, chosen[rank::world].tolist())


def image_channels(cfg: Config, model: nn.Module) -> int:
    """Returns how many channels the images of a model have.

    In this order: ``in_channels`` of the backbone, in the config or by default; the length of the ``mean`` that the
    config normalises with, if it is more than one; what the first convolution of the model takes, up to four; three.
    """
    arguments = backbone_arguments(cfg)
    for key in CHANNELS:
        if isinstance(channels := arguments.get(key), int):
            return channels
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    mean = preprocessor.get('mean') or []
    return len(mean) if len(mean) > 1 else probe.image_channels(model)


def backbone_arguments(cfg: Config) -> dict[str, Any]:
    """Returns what the backbone of a config is built with, without denoising: what it says, and what is the default.

    Of a backbone that the config does not call one (in the list of mmpretrain's retriever) nothing is known.
    """
    try:
        config = next(iter(backbone_configs(cfg.model).values()))
    except InputError:
        return {}
    while isinstance(config.get('backbone'), Mapping):  # DenoiseRepBackbone around it
        config = config['backbone']
    kind = config['type']
    if isinstance(kind, str):
        with _scope(cfg), MODELS.switch_scope_and_registry(config.get('_scope_')) as registry:
            kind = registry.get(kind)
    given = inspect.signature(kind).parameters.items() if kind else ()
    return {name: p.default for name, p in given if p.default is not inspect.Parameter.empty} | dict(config)


def datasets_of(cfg: Config, split: str) -> list[Any]:
    """Returns the data sets of a split, each a config or a built object: one, or those of a list.

    Args:
        cfg: The config; its data loader may be a list, or built already.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        InputError: There is none.
    """
    loaders = cfg.get(f'{split}_dataloader')
    if not loaders:
        raise InputError(f'the config has no {split}_dataloader')
    datasets: list[Any] = []
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else getattr(loader, 'dataset', None)
        if dataset is None:
            raise InputError(f'the {split}_dataloader of the config has no dataset')
        datasets += dataset if isinstance(dataset, list | tuple) else [dataset]
    return datasets


def leaves(dataset: Any) -> Iterator[Any]:
    """Yields what a data set is made of, below all that wraps it: the parts of its config, or built objects."""
    inner = _inner(dataset)
    if not inner:
        yield dataset
    for part in inner:
        yield from leaves(part)


def _inner(dataset: Any) -> list[Any]:
    """Returns the data sets that a config of a data set, or a built one, holds."""
    return [
        part for parts in _held(dataset).values() for part in (parts if isinstance(parts, list | tuple) else [parts])
    ]


def _held(dataset: Any) -> dict[str, Any]:
    """Returns them by key or attribute, a data set or a list of some."""
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
    return kind is not None and ('pipeline' in value or bool(_held(value)) or _is_kind(kind))


def _kind(config: dict[str, Any]) -> Any:
    """Returns what the config of a data set builds; None if no library has it."""
    kind = config.get('type')  # in lazy configs the object
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(config.get('_scope_')) as registry:
            kind = registry.get(kind)
    return kind


def _is_built(value: Any) -> bool:
    return not isinstance(value, type) and _is_kind(type(value))


def _is_kind(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Dataset) or hasattr(kind, 'get_data_info'))


def _test_datasets(cfg: Config) -> list[Any]:
    return datasets_of(cfg, 'test' if cfg.get('test_dataloader') or not cfg.get('val_dataloader') else 'val')


def _steps_of(datasets: Sequence[Any]) -> list[Callable]:
    """Returns the steps of the one pipeline that all of some data sets have.

    Raises:
        InputError: There is none, or there are several.
    """
    found: list[Any] = []
    for steps in (steps for dataset in datasets for steps in _pipelines(dataset)):
        if steps not in found:
            found.append(steps)
    if len(found) > 1:
        kind = _name(datasets[0]) if len(datasets) == 1 else 'a list'
        raise InputError(
            f'the test data set of the config ({kind}) has parts with {len(found)} different pipelines, of which other '
            'images can take but one; name one with --cfg-options test_dataloader.dataset=...'
        )
    return [TRANSFORMS.build(step) if isinstance(step, dict) else step for step in found[0]]


def _pipelines(dataset: Any) -> Iterator[list[Any]]:
    """Yields the steps of each leaf of a data set, with those of what wraps it behind them."""
    own = _own_steps(dataset)
    inner = _inner(dataset)
    if not inner and own is None and isinstance(dataset, dict):
        own = _own_steps(DATASETS.build(dataset))
    if not inner:
        if own is None:
            raise InputError(f'the test data set of the config ({_name(dataset)}) has no pipeline')
        yield own
    for part in inner:
        for steps in _pipelines(part):
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


def _build(dataset: Any, steps: list[Callable] | None, reading: _Reading, what: str) -> Any:
    """Returns a data set in which every leaf ends in a :class:`_Pipeline`.

    Args:
        dataset: Its config, or the built data set, which stays as it is.
        steps: Those of the pipeline; None takes the steps of each leaf itself, and leaves what wraps it.
        reading: For the pipelines.
        what: For messages.
    """
    if isinstance(dataset, dict):
        try:
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
    return _with_pipeline(dataset, steps, reading)


def _once(dataset: Any, with_steps: bool) -> Any:
    """Returns the config of a data set with each image once, and on demand without the steps of its pipelines."""
    if isinstance(dataset, list | tuple):
        return type(dataset)(_once(part, with_steps) for part in dataset)
    if not isinstance(dataset, dict):
        return dataset
    held = {key: _once(value, with_steps) for key, value in _held(dataset).items()}
    if _name(dataset).rpartition('.')[2] == RepeatDataset.__name__:
        return held['dataset']
    return ConfigDict(dataset, **held, **({} if with_steps or 'pipeline' not in dataset else dict(pipeline=[])))


def _with_pipeline(dataset: Any, steps: list[Callable] | None, reading: _Reading) -> Any:
    """Returns the same data set with other pipelines, see :func:`_build`."""
    if isinstance(dataset, list | tuple):
        return type(dataset)(_with_pipeline(part, steps, reading) for part in dataset)
    new = copy.copy(dataset)
    held = _held(dataset)
    for name, value in held.items():
        setattr(new, name, _with_pipeline(value, steps, reading))
    pipeline, own = _pipeline_name(dataset), _own_steps(dataset)
    if pipeline is None or own is None:
        return new
    if held:
        if steps is not None:
            setattr(new, pipeline, [])
        return new
    setattr(new, pipeline, _Pipeline(own if steps is None else steps, reading))
    if hasattr(new, 'prepare_data'):  # that of mmengine's data sets, which take another image where it returns None
        new.prepare_data = partial(_prepare, new.prepare_data)
    return new


def _prepare(prepare_data: Callable, index: int) -> Any:
    if (packed := prepare_data(index)) is None:
        raise _Missing
    return packed


def _parts(dataset: Any) -> Iterator[Any]:
    """Yields a built data set and all in it."""
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
    """Returns the ends of the names of images: the usual ones, and those that the test data sets name."""
    found = list(SUFFIXES)
    with _scope(cfg):
        for leaf in (leaf for dataset in _test_datasets(cfg) for leaf in leaves(dataset)):
            for key in ('img_suffix', 'extensions'):
                named = _argument(leaf, key)
                found += [named] if isinstance(named, str) else named or ()
    return tuple(dict.fromkeys(suffix.lower() for suffix in found))


def _argument(leaf: Any, key: str) -> Any:
    """Returns an argument of a data set: as its config or the built object has it, or the default of its class."""
    if not isinstance(leaf, dict):
        return getattr(leaf, key, None)
    if leaf.get(key) is not None:
        return leaf[key]
    kind = _kind(leaf)
    if isinstance(kind, type) and issubclass(kind, BaseDataset):  # its class may hand it to the one that it inherits
        with contextlib.suppress(Exception):  # what is read of it is a default
            return getattr(DATASETS.build(dict(leaf, lazy_init=True, pipeline=[])), key, None)
    parameters = inspect.signature(kind).parameters if kind else {}
    return parameters[key].default if key in parameters else None


def _brings_rgb(dataset: Any) -> bool:
    kinds = [_kind(leaf) if isinstance(leaf, dict) else type(leaf) for leaf in leaves(dataset)]
    return all(any(base.__name__ == RGB for base in getattr(kind, '__mro__', ())) for kind in kinds)


def _name(dataset: Any) -> str:
    kind = dataset.get('type', '') if isinstance(dataset, dict) else type(dataset)
    return getattr(kind, '__name__', str(kind))


def _has_image(results: Any) -> bool:
    """Whether an image is there, not the path of one."""
    found = [results.get('img'), results.get('inputs')] if isinstance(results, dict) else []
    return any(value is not None and not isinstance(value, str | os.PathLike) for value in found)


def _is_of_library(step: Callable) -> bool:
    return type(step).__module__.startswith(LIBRARIES)


def _loads_annotations(step: Callable) -> bool:
    return any(base.__name__ in ANNOTATIONS and base.__module__.startswith(LIBRARIES) for base in type(step).__mro__)


def _is_broken(path: Any) -> bool:
    """Whether a file is not there, is empty, or is a picture that can't be decoded."""
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

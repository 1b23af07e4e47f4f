"""Five data sets for re-identification in the layout of their archives."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmpretrain.datasets import BaseDataset
from numpy.typing import NDArray

from ..core import InputError
from ..core.utils.errors import printable

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
"""Suffixes of image files, in lower or upper case."""
Image = tuple[str, int, int]
"""Path, identity as in the data, and camera, counted from 0."""


class ReIDDataset(BaseDataset):
    """Base class of the data sets for re-identification.

    A sample has ``img_path``, ``pid`` (int, identity as in the data), ``camid`` (int, camera counted from 0) and
    ``is_query`` (bool). Training samples also have ``gt_label``, the identity renumbered from 0 in the order of
    ``pid``. Equal numbers in training and testing are different identities.

    Args:
        data_root: Folder with the layout of the class, or its parent folder.
        split: ``'train'``, ``'query'``, ``'gallery'``, or ``'test'``: the queries followed by the gallery.
        **kwargs: Arguments of mmpretrain's ``BaseDataset``, such as ``pipeline``.

    Raises:
        InputError: The split is unknown, a part of the layout is missing, or a file name or a line of a list does not
            match the pattern of the data set.
    """

    PARTS = {'train': ('train',), 'query': ('query',), 'gallery': ('gallery',), 'test': ('query', 'gallery')}
    LAYOUT: str
    WRAPPERS: tuple[str, ...] = ()
    PUBLISHED: dict[str, str] = {}

    def __init__(self, data_root: str, split: str, **kwargs: Any) -> None:
        if split not in self.PARTS:
            raise InputError(f'split of {type(self).__name__} must be one of {", ".join(self.PARTS)}, got {split!r}')
        self.split = split
        super().__init__(ann_file='', data_root=str(data_root), test_mode=split != 'train', **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Returns the samples of the split, and logs their number."""
        samples: list[dict[str, Any]] = []
        for part in self.PARTS[self.split]:
            images = self.load_part(part)
            if not images:
                raise InputError(f'{self.data_root} has no images for {part}, expected: {self.LAYOUT}')
            self._log_counts(part, images)
            samples += [
                dict(img_path=path, pid=pid, camid=camid, is_query=part == 'query') for path, pid, camid in images
            ]
        if self.split == 'train':
            labels = {pid: label for label, pid in enumerate(sorted({sample['pid'] for sample in samples}))}
            for sample in samples:
                sample['gt_label'] = labels[sample['pid']]
        return samples

    def load_part(self, part: str) -> list[Image]:
        """Returns the images of ``'train'``, ``'query'`` or ``'gallery'``."""
        raise NotImplementedError

    def find(self, *names: str) -> Path:
        """Returns the first existing file or folder.

        Args:
            *names: Paths relative to the folder of the layout.

        Raises:
            InputError: None of them exists.
        """
        root = Path(self.data_root)
        root = next((root / wrapper for wrapper in self.WRAPPERS if (root / wrapper).is_dir()), root)
        for name in names:
            if (root / name).exists():
                return root / name
        raise InputError(f'{root} lacks {" or ".join(names)}, expected: {self.LAYOUT}')

    def extra_repr(self) -> list[str]:
        """Returns additional lines for the printed data set."""
        return [f'Split: \t{self.split}', f'Root of dataset: \t{self.data_root}']

    def describe(self, part: str) -> str:
        """Returns the name of a part in the log and in ``PUBLISHED``."""
        return part

    def _log_counts(self, part: str, images: list[Image]) -> None:
        name = self.describe(part)
        pids, camids = ({image[field] for image in images} for field in (1, 2))
        cameras = f', {len(camids)} cameras' if len(camids) > 1 else ''
        published = f' (published: {self.PUBLISHED[name]})' if name in self.PUBLISHED else ''
        counts = f'{len(pids):,} identities, {len(images):,} images{cameras}'
        print_log(f'{type(self).__name__} {name}: {counts}{published}', logger='current')


@DATASETS.register_module()
class Market1501(ReIDDataset):
    """Market-1501 (Zheng et al., ICCV 2015).

        market1501/{bounding_box_train,query,bounding_box_test}/0002_c1s1_000451_03.jpg

    A file name has identity, camera, sequence, frame and box. Identity -1 is junk and skipped; identity 0 marks
    distractors, which stay in the gallery as one identity. Images may be links and have any suffix of ``SUFFIXES``;
    hidden and other files are skipped and logged.
    """

    LAYOUT = 'market1501/{bounding_box_train,query,bounding_box_test}/0002_c1s1_000451_03.jpg'
    WRAPPERS = ('Market-1501-v15.09.15',)
    FOLDERS = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
    NAME = re.compile(r'(-1|\d+)_c([1-9]\d*)s\d+_\d+_\d+.*')
    PUBLISHED = {
        'train': '751 identities, 12,936 images',
        'query': '750 identities, 3,368 images',
        'gallery': '751 identities, 15,913 images',
    }

    def load_part(self, part: str) -> list[Image]:
        """Returns the images of a folder in the order of their names."""
        images: list[Image] = []
        paths, others = split_folder(self.find(self.FOLDERS[part]))
        for path in paths:
            pid, camera = map(int, match(self.NAME, path.name, str(path)))
            if pid != -1:
                images.append((str(path), pid, camera - 1))
        self._log_rest(part, paths, others)
        return images

    def _log_rest(self, part: str, paths: list[Path], others: list[Path]) -> None:
        name = f'{type(self).__name__} {part}'
        if others:
            shown = ', '.join(path.name for path in others[:5])
            more = ', ...' if len(others) > 5 else ''
            print_log(f'{name}: {len(others):,} left out that are no images: {printable(shown)}{more}', 'current')
        stems = Counter(path.stem for path in paths)
        if twice := [path for path in paths if stems[path.stem] > 1]:
            text = f'{name}: {len(twice):,} images have the name of another one but for the suffix, such as'
            print_log(f'{text} {printable(twice[0].name)}', 'current', logging.WARNING)


@DATASETS.register_module()
class DukeMTMCReID(Market1501):
    """DukeMTMC-reID (Zheng et al., ICCV 2017), withdrawn by its authors: do not redistribute it.

        dukemtmcreid/{bounding_box_train,query,bounding_box_test}/0005_c2_f0046985.jpg

    A file name has identity, camera and frame. Each distractor in the gallery has an identity of its own.
    """

    LAYOUT = 'dukemtmcreid/{bounding_box_train,query,bounding_box_test}/0005_c2_f0046985.jpg'
    WRAPPERS = ('DukeMTMC-reID',)
    NAME = re.compile(r'(\d+)_c([1-9]\d*)_f\d+.*')
    # source: README of DukeMTMC-reID_evaluation, by the authors of the data set
    PUBLISHED = {
        'train': '702 identities, 16,522 images',
        'query': '702 identities, 2,228 images',
        'gallery': '1,110 identities, 17,661 images',
    }


@DATASETS.register_module()
class MSMT17(ReIDDataset):
    """MSMT17 (Wei et al., CVPR 2018), version 1, or version 2 with blurred faces.

        MSMT17/{train,test}/0000/0000_000_01_0303morning_0015_0.jpg
        MSMT17/list_{train,val,query,gallery}.txt

    Version 2 has ``mask_train_v2`` and ``mask_test_v2``. The third field of a file name is the camera; a line of a list
    has a path and the identity. The validation list belongs to training, as in TransReID. If the parent folder has both
    ``MSMT17_V1`` and ``MSMT17_V2``, version 1 is used.
    """

    LAYOUT = 'MSMT17/{train,test,list_train.txt,list_val.txt,list_query.txt,list_gallery.txt}'
    WRAPPERS = ('MSMT17_V1', 'MSMT17_V2')
    LINE = re.compile(r'([^\s_]+_[^\s_]+_0*([1-9]\d*)_\S+\.[A-Za-z]+)\s+(\d+)')
    PUBLISHED = {
        'train': '1,041 identities, 32,621 images',
        'query': '3,060 identities, 11,659 images',
        'gallery': '3,060 identities, 82,161 images',
    }

    def load_part(self, part: str) -> list[Image]:
        """Returns the images in the order of the lists."""
        side = 'train' if part == 'train' else 'test'
        folder = self.find(side, f'mask_{side}_v2')
        images: list[Image] = []
        for name in ('train', 'val') if part == 'train' else (part,):
            list_file = self.find(f'list_{name}.txt')
            listed = [
                (str(folder / path), int(pid), int(camera) - 1) for path, camera, pid in read_list(list_file, self.LINE)
            ]
            check_images_exist(listed, list_file)
            images += listed
        return images


@DATASETS.register_module()
class VehicleID(ReIDDataset):
    """PKU VehicleID (Liu et al., CVPR 2016).

        VehicleID_V1.0/image/0000001.jpg
        VehicleID_V1.0/train_test_split/{train_list,test_list_800,test_list_1600,test_list_2400}.txt

    A line of a list has the name of an image without suffix and the identity. There are no cameras (``camid`` is 0) and
    no fixed queries (``is_query`` is False): set ``trials`` of ``ReIDMetric``, which draws the gallery.

    Args:
        data_root: See :class:`ReIDDataset`.
        split: ``'train'`` or ``'test'``.
        size: Number of identities of the test list: 800, 1600 or 2400.
        **kwargs: See :class:`ReIDDataset`.

    Raises:
        InputError: See :class:`ReIDDataset`; or the size is unknown.
    """

    PARTS = {'train': ('train',), 'test': ('test',)}
    SIZES = (800, 1600, 2400)
    LAYOUT = 'VehicleID_V1.0/{image,train_test_split/{train_list,test_list_800,test_list_1600,test_list_2400}.txt}'
    WRAPPERS = ('VehicleID_V1.0',)
    LINE = re.compile(r'(\S+)\s+(\d+)')
    PUBLISHED = {
        'test 800': '800 identities, 6,493 images',
        'test 1600': '1,600 identities, 13,377 images',
        'test 2400': '2,400 identities, 19,777 images',
    }

    def __init__(self, data_root: str, split: str, size: int = 800, **kwargs: Any) -> None:
        if size not in self.SIZES:
            raise InputError(f'size of VehicleID must be one of 800, 1600, 2400, got {size!r}')
        self.size = size
        super().__init__(data_root, split, **kwargs)

    def load_part(self, part: str) -> list[Image]:
        """Returns the images in the order of the list."""
        folder = self.find('image')
        name = 'train_list' if part == 'train' else f'test_list_{self.size}'
        list_file = self.find(f'train_test_split/{name}.txt')
        present = {name.rpartition('.')[0]: name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES)}
        listed = [(present.get(name, f'{name}.jpg'), name, int(pid)) for name, pid in read_list(list_file, self.LINE)]
        refuse_missing([folder / file for file, name, _ in listed if name not in present], len(listed), list_file)
        return [(str(folder / file), pid, 0) for file, _, pid in listed]

    def describe(self, part: str) -> str:
        """Returns ``'train'``, or ``'test'`` and the size."""
        return part if part == 'train' else f'{part} {self.size}'


@DATASETS.register_module()
class CUHK03(ReIDDataset):
    """CUHK-03 (Li et al., CVPR 2014) under the new protocol (Zhong et al., CVPR 2017).

        cuhk03/cuhk03_release/cuhk-03.mat
        cuhk03/cuhk03_new_protocol_config_{labeled,detected}.mat

    Images are read from the MAT file on access. A sample has ``img``, (H, W, 3), uint8, BGR, ``ori_shape`` and
    ``img_shape``, so the pipeline needs no ``LoadImageFromFile``. ``img_path`` is a name such as ``1_001_1_01.png``:
    pair of cameras, person, view (which gives the camera) and image.

    Args:
        data_root: See :class:`ReIDDataset`.
        split: See :class:`ReIDDataset`.
        style: ``'labeled'`` for boxes drawn by hand, ``'detected'`` for boxes of a detector.
        **kwargs: See :class:`ReIDDataset`.

    Raises:
        ImportError: h5py or scipy is not installed.
        InputError: See :class:`ReIDDataset`; or the style is unknown, or a MAT file is damaged.
    """

    STYLES = ('labeled', 'detected')
    LAYOUT = 'cuhk03/{cuhk03_release/cuhk-03.mat,cuhk03_new_protocol_config_{labeled,detected}.mat}'
    NAME = re.compile(r'([1-5])_0*([1-9]\d*)_([12])_0*([1-9]\d*)\.png')
    # source: README of person-re-ranking, by the authors of the protocol
    PUBLISHED = {
        'labeled train': '767 identities, 7,368 images',
        'labeled query': '700 identities, 1,400 images',
        'labeled gallery': '700 identities, 5,328 images',
        'detected train': '767 identities, 7,365 images',
        'detected query': '700 identities, 1,400 images',
        'detected gallery': '700 identities, 5,332 images',
    }

    def __init__(self, data_root: str, split: str, style: str = 'labeled', **kwargs: Any) -> None:
        if style not in self.STYLES:
            raise InputError(f'style of CUHK03 must be one of labeled, detected, got {style!r}')
        self.style = style
        super().__init__(data_root, split, **kwargs)

    def load_part(self, part: str) -> list[Image]:
        """Returns the images in the order of the protocol."""
        self.mat_file = str(self.find('cuhk03_release/cuhk-03.mat', 'cuhk-03.mat'))
        open_cells(self.mat_file, self.style, os.getpid())  # fails here on a damaged file, not in a worker
        protocol = self.find(f'cuhk03_new_protocol_config_{self.style}.mat')
        images: list[Image] = []
        for name, pid in read_protocol(protocol, part):
            view = match(self.NAME, name, f'{name} in {protocol}')[2]
            images.append((name, pid, int(view) - 1))
        return images

    def prepare_data(self, idx: int) -> Any:
        """Reads an image and returns its sample after the pipeline."""
        sample = self.get_data_info(idx)
        image = self.read_image(sample['img_path'])
        sample.update(img=image, ori_shape=image.shape[:2], img_shape=image.shape[:2])
        return self.pipeline(sample)

    def read_image(self, name: str) -> NDArray[np.uint8]:
        """Returns an image by its name, such as ``1_001_1_01.png``: (H, W, 3), uint8, BGR.

        Raises:
            ValueError: The MAT file has no such image.
        """
        pair, person, _, number = map(int, match(self.NAME, name, name))
        file, cells = open_cells(self.mat_file, self.style, os.getpid())
        try:
            image = file[cells[pair - 1][person - 1, number - 1]][()].T  # MATLAB stores columns first, RGB
        except IndexError:
            image = np.empty(0)
        if image.ndim != 3:
            raise ValueError(f'{self.mat_file} has no {self.style} image {name}, which the protocol names')
        return np.ascontiguousarray(image[..., ::-1])

    def describe(self, part: str) -> str:
        """Returns the style and the part."""
        return f'{self.style} {part}'


@lru_cache
def open_cells(path: str, style: str, process: int) -> tuple[Any, list[NDArray[Any]]]:
    """Opens ``cuhk-03.mat`` once in each process.

    The cache keeps the handle out of the data set, since HDF5 handles can't be pickled or copied.

    Args:
        path: Path of the file.
        style: ``'labeled'`` or ``'detected'``.
        process: Process ID, so that a forked worker opens the file again.

    Returns:
        The open file; for each of the five pairs of cameras the references to its images, (persons, 10).

    Raises:
        ImportError: h5py is not installed.
        InputError: The file is damaged, or is not ``cuhk-03.mat``.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('CUHK03 needs h5py to read cuhk-03.mat: pip install h5py') from error
    try:
        file = h5py.File(path, 'r')
        return file, [file[pair][()].T for pair in file[style][0]]
    except (OSError, KeyError) as error:
        raise InputError(f'{path} is damaged or not the cuhk-03.mat of CUHK-03: {error}') from error


def read_protocol(path: Path, part: str) -> list[tuple[str, int]]:
    """Reads ``cuhk03_new_protocol_config_{labeled,detected}.mat``.

    Args:
        path: Path of the file.
        part: ``'train'``, ``'query'`` or ``'gallery'``.

    Returns:
        Name and identity of each image of the part.

    Raises:
        ImportError: scipy is not installed.
        InputError: The file is damaged, or is not a protocol of CUHK-03.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f'CUHK03 needs scipy to read {path.name}: pip install scipy') from error
    try:
        protocol = loadmat(path)
        names, pids, numbers = (protocol[key].ravel() for key in ('filelist', 'labels', f'{part}_idx'))
        return [(str(names[i].item()), int(pids[i])) for i in numbers.astype(int) - 1]
    except Exception as error:  # scipy fails on damaged files in many ways
        raise InputError(f'{path} is damaged or not a protocol of CUHK-03 ({type(error).__name__}: {error})') from error


def match(pattern: re.Pattern[str], text: str, what: str) -> tuple[str, ...]:
    """Returns the groups of a full match.

    Args:
        pattern: Regular expression.
        text: Text to match.
        what: Description of the text, for messages.

    Raises:
        InputError: The text does not match.
    """
    found = pattern.fullmatch(text)
    if not found:
        raise InputError(f'{what} does not fit the grammar {pattern.pattern}')
    return found.groups()


def read_list(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """Yields the groups of every line that is not empty.

    Raises:
        InputError: A line does not match the pattern.
    """
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        if line.strip():
            yield match(pattern, line.strip(), f'line {number} of {path}, {line!r},')


def split_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the images of a folder, and its other entries, both sorted; hidden files are no images.

    Raises:
        InputError: An image is a broken link, or not a file.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        is_image = path.suffix.lower() in SUFFIXES and not path.name.startswith('.')
        (images if is_image else others).append(path)
    if lost := [path for path in images if not path.is_file()]:
        what = 'a link to nothing' if lost[0].is_symlink() else 'not a file'
        raise InputError(f'{lost[0]} is {what} ({len(lost):,} of the {len(images):,} images): mend it, or remove it')
    return images, others


def check_images_exist(images: list[Image], list_file: Path) -> None:
    """Raises InputError if an image of a list is missing; lists folders, which is faster than checking every file."""
    paths = [os.path.split(image[0]) for image in images]
    folders = {folder for folder, _ in paths}
    present = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    missing = [Path(folder, name) for folder, name in paths if name not in present[folder]]
    refuse_missing(missing, len(images), list_file)


def refuse_missing(missing: list[Path], count: int, list_file: Path) -> None:
    """Raises InputError if images of a list are missing.

    Args:
        missing: The missing images.
        count: Number of all images in the list.
        list_file: Path of the list.
    """
    if missing:
        raise InputError(
            f'{missing[0]} is missing ({len(missing):,} of the {count:,} images in {list_file}): unpack it again'
        )

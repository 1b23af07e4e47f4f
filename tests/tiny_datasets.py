"""Writes tiny data sets in the exact on-disk formats that the dataset classes of the libraries read.

The images are random but seeded. The lists of classes are whole, and every split begins with one image of the first
class and one of the last, so that a wrong number of classes does not go unseen.
"""

import json
import pickle
import runpy
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import scipy.io
from mmdet.datasets import CocoDataset
from mmpretrain.datasets import CIFAR10, CUB, OxfordIIITPet
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]
PER_SPLIT = 3
"""Images in each split: one of the first class, two of the last."""


def write_image(path: Path, generator: np.random.Generator, size: tuple[int, int] = (64, 80)) -> None:
    """Writes a random colour image of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = generator.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(coarse, size[::-1]))


def labels(classes: int) -> list[int]:
    """Returns the labels of one split, counted from 0."""
    return [0, classes - 1, classes - 1]


def write_imagenet(root: Path) -> None:
    """ImageNet-1k: ``{train,val}/<wnid>/*.JPEG`` with all 1000 folders; mmpretrain numbers them alphabetically."""
    generator = np.random.default_rng(0)
    wnids = [f'n{1440764 + 1000 * i:08d}' for i in range(1000)]
    for split in ('train', 'val'):
        for wnid in wnids:
            (root / split / wnid).mkdir(parents=True)
        for i, label in enumerate(labels(1000)):
            name = f'{wnids[label]}_{i}' if split == 'train' else f'ILSVRC2012_val_{i + 1:08d}'
            write_image(root / split / wnids[label] / f'{name}.JPEG', generator)


def write_cifar10(root: Path) -> None:
    """CIFAR-10: the pickles of the python version. Their checksums are not those that mmpretrain knows."""
    generator = np.random.default_rng(1)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        batch = {
            'batch_label': name,
            'labels': labels(10),
            'data': generator.integers(0, 256, (PER_SPLIT, 3 * 32 * 32), dtype=np.uint8),
            'filenames': [f'{name}_{i}.png' for i in range(PER_SPLIT)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {'num_cases_per_batch': PER_SPLIT, 'label_names': list(CIFAR10.METAINFO['classes']), 'num_vis': 3072}
    (folder / 'batches.meta').write_bytes(pickle.dumps(meta, protocol=2))


def write_cub(root: Path) -> None:
    """CUB-200-2011: images by class, and text files that number images and classes from 1."""
    generator = np.random.default_rng(2)
    classes = [f'{i + 1:03d}.{name}' for i, name in enumerate(CUB.METAINFO['classes'])]
    rows = []
    for is_train in (1, 0):
        for label in labels(len(classes)):
            number = len(rows) + 1
            name = f'{classes[label]}/{classes[label][4:]}_{number:04d}_{number}.jpg'
            write_image(root / 'images' / name, generator)
            rows.append((number, name, label + 1, is_train))
    for file, column in {'images.txt': 1, 'image_class_labels.txt': 2, 'train_test_split.txt': 3}.items():
        (root / file).write_text(''.join(f'{row[0]} {row[column]}\n' for row in rows))
    (root / 'classes.txt').write_text(''.join(f'{i + 1} {name}\n' for i, name in enumerate(classes)))


def write_oxford_pets(root: Path) -> None:
    """Oxford-IIIT Pet: ``annotations/{trainval,test}.txt`` with image, class from 1, species and breed."""
    generator = np.random.default_rng(3)
    classes = OxfordIIITPet.METAINFO['classes']
    (root / 'annotations').mkdir(parents=True)
    for split, first in {'trainval': 100, 'test': 1}.items():
        lines = []
        for i, label in enumerate(labels(len(classes))):
            name = f'{classes[label].replace(" ", "_")}_{first + i}'
            write_image(root / 'images' / f'{name}.jpg', generator)
            lines.append(f'{name} {label + 1} 1 1\n')
        (root / 'annotations' / f'{split}.txt').write_text(''.join(lines))


def write_flowers102(root: Path) -> None:
    """Flowers-102: ``jpg/image_00001.jpg`` and on, their labels from 1, and the image numbers of the three splits."""
    generator = np.random.default_rng(4)
    splits = ('trnid', 'valid', 'tstid')
    numbers = np.arange(1, len(splits) * PER_SPLIT + 1, dtype=np.uint16)
    for number in numbers:
        write_image(root / 'jpg' / f'image_{number:05d}.jpg', generator)
    all_labels = np.array(labels(102) * len(splits), np.uint8) + np.uint8(1)
    scipy.io.savemat(root / 'imagelabels.mat', {'labels': all_labels[None]}, do_compression=True)
    ids = {split: part[None] for split, part in zip(splits, numbers.reshape(len(splits), -1), strict=True)}
    scipy.io.savemat(root / 'setid.mat', ids, do_compression=True)


def write_fashion_mnist(root: Path) -> None:
    """Fashion-MNIST: unpacked idx files, big-endian, as mmpretrain leaves them in the data root."""
    generator = np.random.default_rng(5)
    root.mkdir(parents=True)
    for split in ('train', 't10k'):
        images = generator.integers(0, 256, (PER_SPLIT, 28, 28), dtype=np.uint8)
        for kind, array in {'images': images, 'labels': np.array(labels(10), np.uint8)}.items():
            header = b'\0\0\x08' + bytes([array.ndim]) + np.array(array.shape, '>i4').tobytes()
            (root / f'{split}-{kind}-idx{array.ndim}-ubyte').write_bytes(header + array.tobytes())


def write_coco(root: Path) -> None:
    """COCO 2017: all 80 categories with their gapped ids, polygons, one crowd as run lengths, one empty image."""
    generator = np.random.default_rng(6)
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in gaps]
    categories = [
        {'supercategory': 'thing', 'id': i, 'name': name}
        for i, name in zip(ids, CocoDataset.METAINFO['classes'], strict=True)
    ]
    height, width = 96, 128
    (root / 'annotations').mkdir(parents=True)
    for split in ('train2017', 'val2017'):
        images, annotations = [], []
        for i in range(PER_SPLIT + 1):
            image_id = 139 + 146 * i
            name = f'{image_id:012d}.jpg'
            write_image(root / split / name, generator, (height, width))
            images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
            chosen = [ids[0], ids[-1], int(generator.choice(ids))] if i < PER_SPLIT else []
            for category in chosen:
                left, top = generator.uniform(0, 60, 2)
                right, bottom = generator.uniform(left + 24, width), generator.uniform(top + 24, height)
                segmentation = [[left, top, right, top, right, bottom, left, bottom]]
                rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
                crowd = not any(annotation['iscrowd'] for annotation in annotations) and category == chosen[-1]
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': image_id,
                        'category_id': category,
                        'iscrowd': int(crowd),
                        'segmentation': run_lengths(coco_mask.decode(rle)) if crowd else segmentation,
                        'area': float(coco_mask.area(rle)),
                        'bbox': coco_mask.toBbox(rle).tolist(),
                    }
                )
        coco = {'info': {}, 'licenses': [], 'images': images, 'annotations': annotations, 'categories': categories}
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def run_lengths(mask: np.ndarray) -> dict:
    """Returns COCO's uncompressed form of a mask: the lengths of its runs down the columns, zeros first."""
    pixels = mask.ravel('F').astype(int)
    edges = np.flatnonzero(np.diff(pixels, prepend=0, append=1 - pixels[-1]))
    return {'counts': np.diff(edges, prepend=0).tolist(), 'size': list(mask.shape)}


def write_ade20k(root: Path) -> None:
    """ADE20K of the scene parsing challenge: one-channel maps, 0 is nothing, 1 to 150 are the classes, all present."""
    generator = np.random.default_rng(7)
    for split, prefix in {'training': 'ADE_train', 'validation': 'ADE_val'}.items():
        (root / 'annotations' / split).mkdir(parents=True)
        for i in range(PER_SPLIT):
            name = f'{prefix}_{i + 1:08d}'
            write_image(root / 'images' / split / f'{name}.jpg', generator, (96, 128))
            cells = generator.permutation(np.arange(12 * 16, dtype=np.uint8) % 151).reshape(12, 16)
            cv2.imwrite(str(root / 'annotations' / split / f'{name}.png'), np.kron(cells, np.ones((8, 8), np.uint8)))


def write_scenes(root: Path) -> None:
    """The scenes of the demo, composed by its own tool."""
    command = ['make_scenes.py', str(root), '--train', str(PER_SPLIT), '--val', str(PER_SPLIT)]
    with mock.patch.object(sys, 'argv', command):
        runpy.run_path(str(ROOT / 'tools/make_scenes.py'), run_name='__main__')


WRITERS = {
    'data/imagenet': write_imagenet,
    'data/cifar10': write_cifar10,
    'data/CUB_200_2011': write_cub,
    'data/Oxford-IIIT_Pets': write_oxford_pets,
    'data/Flowers102': write_flowers102,
    'data/coco': write_coco,
    'data/ade/ADEChallengeData2016': write_ade20k,
    'work_dirs/fashion-mnist': write_fashion_mnist,
    'work_dirs/scenes': write_scenes,
}
"""The folders that the configs read, relative to where a run is started."""


def write_all(root: Path) -> None:
    """Writes every data set below a folder; runs that are started there find them without a change of the config."""
    for folder, write in WRITERS.items():
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        write(root / folder)


def without_checksums(files: list[list]) -> list[list]:
    """Returns mmpretrain's table of CIFAR files without the MD5 sums of the real ones."""
    return [[name, None] for name, _ in files]

"""Writes tiny data sets in the exact on-disk formats that the dataset classes of the libraries read.

The images are random but seeded. The lists of classes are whole, and every split begins with one image of the first
class and one of the last, so that a wrong number of classes does not go unseen.
"""

import json
import pickle
from pathlib import Path

import cv2
import h5py
import numpy as np
import scipy.io
from mmdet.datasets import CocoDataset
from mmpretrain.datasets import CIFAR10, CUB, OxfordIIITPet
from pycocotools import mask as coco_mask

from tools_helpers import run_tool

PER_SPLIT = 3
"""Images in each split: one of the first class, two of the last."""


def write_image(path: Path, generator: np.random.Generator, size: tuple[int, int] = (64, 80)) -> None:
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


PEOPLE: dict[str, dict[int, tuple[int, ...]]] = {
    'train': {2: (1, 1, 2, 2, 3), 7: (1, 1, 2, 2), 100: (1, 2, 2, 3), 11: (1, 1, 3, 3), 23: (2, 3)},
    'query': {5: (1, 2), 8: (3,), 30: (1,)},
    'gallery': {5: (1, 2, 2, 3), 8: (1, 1, 3), 30: (1,)},
}
"""Cameras of the images of each identity. In training, 23 has fewer images than the four that a batch takes of each
identity. In the gallery, every query finds its own camera again, and that of 30 finds no other."""

VEHICLES = {'train': PEOPLE['train'], 800: (5, 8, 30), 1600: (5, 8, 30, 31), 2400: (5, 8, 30, 31, 40)}
"""Identities in the lists of VehicleID; the larger test lists hold the smaller ones."""

CUHK03_PAIRS = ((2, 7, 100), (11, 5), (23,), (8,), (30,))
"""Identities that each pair of cameras sees, in the order of the rows."""


def sightings(part: str) -> list[tuple[int, int, int]]:
    """Returns number, identity and camera of every image of a part; the numbers of queries and gallery differ."""
    pairs = [(pid, camera) for pid, cameras in PEOPLE[part].items() for camera in cameras]
    return [(number, pid, camera) for number, (pid, camera) in enumerate(pairs, {'gallery': 51}.get(part, 1))]


PARTS = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
"""Folders of Market-1501 and of DukeMTMC-reID."""


def write_market1501(root: Path) -> None:
    """Market-1501: names of identity, camera, sequence, frame and box; junk and distractors in the gallery."""
    generator = np.random.default_rng(8)
    others = ('-1_c1s1_000401_03', '-1_c2s1_000402_00', '0000_c1s1_000151_01', '0000_c3s2_000376_03')
    for part, folder in PARTS.items():
        names = [f'{pid:04d}_c{camera}s1_{number:06d}_01' for number, pid, camera in sightings(part)]
        for name in (*names, *others) if part == 'gallery' else names:
            write_image(root / folder / f'{name}.jpg', generator, (64, 32))
        (root / folder / 'Thumbs.db').write_bytes(b'thumbnails of Windows')


def write_dukemtmcreid(root: Path) -> None:
    """DukeMTMC-reID: names of identity, camera and frame; a distractor in the gallery has an identity of its own."""
    generator = np.random.default_rng(9)
    for part, folder in PARTS.items():
        for number, pid, camera in sightings(part) + [(90, 7139, 8)] * (part == 'gallery'):
            write_image(root / folder / f'{pid:04d}_c{camera}_f{number:07d}.jpg', generator, (64, 32))


def write_msmt17(root: Path) -> None:
    """MSMT17, version 1: four lists of path and identity, which is counted from 0 in training and again in testing."""
    generator = np.random.default_rng(10)
    lists: dict[str, list[str]] = {'train': [], 'val': [], 'query': [], 'gallery': []}
    for part in PEOPLE:
        pids = {pid: new for new, pid in enumerate(sorted(PEOPLE[part]))}
        for number, pid, camera in sightings(part):
            new = pids[pid]
            path = f'{new:04d}/{new:04d}_{number:03d}_{camera:02d}_0303morning_{number:04d}_0.jpg'
            write_image(root / ('train' if part == 'train' else 'test') / path, generator, (64, 32))
            lists['val' if part == 'train' and number % 5 == 0 else part].append(f'{path} {new}\n')
    for name, lines in lists.items():
        (root / f'list_{name}.txt').write_text(''.join(lines))


def write_vehicleid(root: Path) -> None:
    """VehicleID: lists of image and identity; identity 40 has one image only, so it gives no query."""
    generator = np.random.default_rng(11)
    (root / 'train_test_split').mkdir(parents=True)
    names: dict[int, list[str]] = {}
    for pid in (*VEHICLES['train'], *VEHICLES[2400]):
        names[pid] = [f'{10 * pid + i:07d}' for i in range(1 if pid == 40 else 4)]
        for name in names[pid]:
            write_image(root / 'image' / f'{name}.jpg', generator, (48, 64))
    for key, pids in VEHICLES.items():
        lines = [f'{name} {pid}\n' for pid in pids for name in names[pid]]
        file = 'train_list.txt' if key == 'train' else f'test_list_{key}.txt'
        (root / 'train_test_split' / file).write_text(''.join(lines))


def cuhk03_image(style: str, name: str) -> np.ndarray:
    """Returns the RGB image (H, W, 3) that is written under a name; every image has a size of its own."""
    pair, person, _, number = map(int, name.removesuffix('.png').split('_'))
    generator = np.random.default_rng([12, style == 'labeled', pair, person, number])
    return generator.integers(0, 256, (*generator.integers((56, 24), (72, 40)), 3), dtype=np.uint8)


def write_cuhk03(root: Path) -> None:
    """CUHK-03: Matlab's HDF5 with cells of references to images, and the new protocol in Matlab's older format.

    Most cells are empty. The detected boxes lack one training image.
    """
    (root / 'cuhk03_release').mkdir(parents=True)
    with h5py.File(root / 'cuhk03_release/cuhk-03.mat', 'w', userblock_size=512) as file:
        for style in ('labeled', 'detected'):
            listed: list[tuple[str, int, int, str]] = []
            pairs = []
            for pair, pids in enumerate(CUHK03_PAIRS, 1):
                cells = np.empty((len(pids), 10), object)
                for row, pid in enumerate(pids):
                    parts = cuhk03_columns(pid)
                    if style == 'detected' and pid == 2:
                        del parts[6]
                    for column in range(10):
                        view = 1 if column < 5 else 2
                        name = f'{pair}_{row + 1:03d}_{view}_{column + 1:02d}.png'
                        if column in parts:
                            listed.append((name, pid, view, parts[column]))
                            image = file.create_dataset(f'#refs#/{style}_{name}', data=cuhk03_image(style, name).T)
                            image.attrs['MATLAB_class'] = np.bytes_('uint8')
                        else:
                            image = file.create_dataset(f'#refs#/{style}_{name}', data=np.zeros(2, np.uint64))
                            image.attrs.update(MATLAB_class=np.bytes_('double'), MATLAB_empty=np.uint8(1))
                        cells[row, column] = image.ref
                pairs.append(write_cell(file, f'#refs#/{style}_{pair}', cells).ref)
            write_cell(file, style, np.array(pairs, object)[:, None])
            write_cuhk03_protocol(root / f'cuhk03_new_protocol_config_{style}.mat', listed)


def cuhk03_columns(pid: int) -> dict[int, str]:
    """Returns the part of each image of an identity by its column: five for camera 1, then five for the others."""
    free = iter(range(5)), iter(range(5, 10))
    return {next(free[camera > 1]): part for part in PEOPLE for camera in PEOPLE[part].get(pid, ())}


def write_cell(file: h5py.File, name: str, references: np.ndarray) -> h5py.Dataset:
    """Writes a cell array as Matlab does: references, transposed since its order is by columns."""
    cell = file.create_dataset(name, data=references.T, dtype=h5py.ref_dtype)
    cell.attrs['MATLAB_class'] = np.bytes_('cell')
    return cell


def write_cuhk03_protocol(path: Path, listed: list[tuple[str, int, int, str]]) -> None:
    """Writes the protocol; its indices count from 1, and all numbers are columns of doubles."""
    names, pids, views, parts = (np.array(column, object)[:, None] for column in zip(*listed, strict=True))
    indices = {f'{part}_idx': np.argwhere(parts[:, 0] == part) + 1.0 for part in PEOPLE}
    numbers = {'labels': pids.astype(float), 'camId': views.astype(float)}
    scipy.io.savemat(path, {'filelist': names, **numbers, **indices})


def write_scenes(root: Path) -> None:
    run_tool('make_scenes', root, '--train', PER_SPLIT, '--val', PER_SPLIT)


def write_fashion_reid(root: Path) -> None:
    run_tool('make_reid', root, '--ids', 4, '--test-ids', 2)


WRITERS = {
    'data/imagenet': write_imagenet,
    'data/cifar10': write_cifar10,
    'data/CUB_200_2011': write_cub,
    'data/Oxford-IIIT_Pets': write_oxford_pets,
    'data/Flowers102': write_flowers102,
    'data/coco': write_coco,
    'data/ade/ADEChallengeData2016': write_ade20k,
    'data/market1501': write_market1501,
    'data/dukemtmcreid': write_dukemtmcreid,
    'data/MSMT17': write_msmt17,
    'data/cuhk03': write_cuhk03,
    'data/VehicleID_V1.0': write_vehicleid,
    'work_dirs/fashion-mnist': write_fashion_mnist,
    'work_dirs/fashion-reid': write_fashion_reid,
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

"""The tiny data sets are read by the libraries' own classes, with all classes and the labels that were meant."""

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.registry import init_default_scope
from mmpretrain.datasets import CIFAR10, CUB, FashionMNIST, Flowers102, ImageNet, OxfordIIITPet
from mmseg.datasets import ADE20KDataset
from pycocotools.coco import COCO

from tiny_datasets import PER_SPLIT, without_checksums, write_all


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('tiny')
    write_all(root)
    return root


def files(folder):
    """Returns the content of every file but Matlab's, which hold the time of writing."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and path.suffix != '.mat'
    }


def test_the_same_files_every_time(root, tmp_path):
    write_all(tmp_path)
    assert files(root) == files(tmp_path)


@pytest.mark.parametrize(
    ('kind', 'folder', 'train', 'test', 'classes', 'batches'),
    [
        (ImageNet, 'data/imagenet', 'train', 'val', 1000, 1),
        (CIFAR10, 'data/cifar10', 'train', 'test', 10, 5),
        (CUB, 'data/CUB_200_2011', 'train', 'test', 200, 1),
        (OxfordIIITPet, 'data/Oxford-IIIT_Pets', 'trainval', 'test', 37, 1),
        (Flowers102, 'data/Flowers102', 'trainval', 'test', 102, 2),
        (FashionMNIST, 'work_dirs/fashion-mnist', 'train', 'test', 10, 1),
    ],
)
def test_classification(kind, folder, train, test, classes, batches, root, monkeypatch):
    """Both splits have the first and the last class, counted from 0, and every image can be opened."""
    for table in ('train_list', 'test_list'):
        if kind is CIFAR10:
            monkeypatch.setattr(kind, table, without_checksums(getattr(kind, table)))
    for split, number in {train: batches * PER_SPLIT, test: PER_SPLIT}.items():
        mode = dict(test_mode=split == test) if kind in (CIFAR10, CUB, FashionMNIST) else {}
        dataset = kind(data_root=str(root / folder), split=split, pipeline=[], **mode)
        assert len(dataset) == number
        assert list(dataset.get_gt_labels()) == [0, classes - 1, classes - 1] * (number // PER_SPLIT)
        assert dataset.CLASSES is None or len(dataset.CLASSES) == classes
        for sample in dataset:
            image = sample['img'] if 'img' in sample else cv2.imread(sample['img_path'])
            assert image.dtype == np.uint8 and image.std() > 10


def test_coco(root):
    """80 categories, whose last id is 90; polygons and run lengths give masks of the area that is written."""
    folder = root / 'data/coco'
    for split in ('train2017', 'val2017'):
        path = f'annotations/instances_{split}.json'
        dataset = CocoDataset(
            data_root=str(folder),
            ann_file=path,
            data_prefix=dict(img=f'{split}/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
        )
        assert len(dataset) == PER_SPLIT, 'the image of nothing is filtered'
        assert len(dataset.cat_ids) == 80 and max(dataset.cat_ids) == 90
        assert {0, 79} <= {instance['bbox_label'] for instance in dataset[0]['instances']}
        coco = COCO(folder / path)
        annotations = list(coco.anns.values())
        assert [type(a['segmentation']) for a in annotations if a['iscrowd']] == [dict]
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            assert mask.sum() == annotation['area'] > 0
            left, top, width, height = map(round, annotation['bbox'])
            assert mask[top : top + height, left : left + width].sum() >= 0.95 * mask.sum()
        for image in coco.imgs.values():
            assert cv2.imread(str(folder / split / image['file_name'])).shape == (image['height'], image['width'], 3)


def test_ade20k(root):
    """All 150 classes from 0 and nothing else but 255, which is what was 0 on the disk."""
    init_default_scope('mmseg')  # an earlier test may have left another one
    folder = root / 'data/ade/ADEChallengeData2016'
    for split in ('training', 'validation'):
        dataset = ADE20KDataset(
            data_root=str(folder),
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True)],
        )
        assert len(dataset) == PER_SPLIT
        for sample in dataset:
            assert set(np.unique(sample['gt_seg_map'])) == {*range(150), 255}
            assert sample['img'].shape[:2] == sample['gt_seg_map'].shape

"""Tests of studies/make_scenes.py."""

import gzip
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from articles import BAD_FOLDERS, IMAGES, LABELS, missing_source, read_tree, write_source
from helpers import ROOT
from studies import make_scenes
from tools_helpers import run_tool, sentence

SOURCE = ROOT / 'demo' / 'fashion-mnist'
COUNTS = {'training': 6, 'validation': 3}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """A small output."""
    out = tmp_path_factory.mktemp('made') / 'scenes'
    run_tool('make_scenes', out, '--train', COUNTS['training'], '--val', COUNTS['validation'])
    assert [path.name for path in out.parent.iterdir()] == ['scenes']
    return out


@pytest.mark.parametrize('split', COUNTS)
def test_masks_agree_with_semantic_map(scenes, split):
    coco = json.loads((scenes / 'annotations' / f'instances_{split}.json').read_text())
    assert [(c['id'], c['name']) for c in coco['categories']] == list(enumerate(make_scenes.CLASSES, 1))
    assert len(coco['images']) == COUNTS[split]
    for image in coco['images']:
        stem = Path(image['file_name']).stem
        picture = cv2.imread(str(scenes / 'images' / split / image['file_name']), cv2.IMREAD_UNCHANGED)
        semantic = cv2.imread(str(scenes / 'annotations' / split / f'{stem}.png'), cv2.IMREAD_UNCHANGED)
        assert picture.shape == (image['height'], image['width'], 3) == (128, 128, 3)
        assert semantic.shape == (128, 128) and semantic.dtype == np.uint8
        annotations = [a for a in coco['annotations'] if a['image_id'] == image['id']]
        assert 1 <= len(annotations) <= 4
        painted = np.zeros_like(semantic)
        for annotation in annotations:
            mask = coco_mask.decode(annotation['segmentation']).astype(bool)
            assert not painted[mask].any()
            painted[mask] = annotation['category_id']
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation['bbox'] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
            assert annotation['area'] == mask.sum() > 0
            assert annotation['iscrowd'] == 0
        np.testing.assert_array_equal(painted, semantic)


@pytest.mark.parametrize('split', COUNTS)
def test_mmdet_reads_scenes(scenes, split):
    datasets = pytest.importorskip('mmdet.datasets')
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    dataset = datasets.CocoDataset(
        data_root=str(scenes),
        metainfo={'classes': make_scenes.CLASSES},
        ann_file=f'annotations/instances_{split}.json',
        data_prefix={'img': f'images/{split}'},
        filter_cfg={'filter_empty_gt': True, 'min_size': 32},
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
            {'type': 'PackDetInputs', 'meta_keys': ('img_id',)},
        ],
    )
    assert len(dataset) == COUNTS[split]
    for index in range(len(dataset)):
        sample = dataset[index]
        instances = sample['data_samples'].gt_instances
        semantic = cv2.imread(str(scenes / 'annotations' / split / f'{index:05d}.png'), cv2.IMREAD_UNCHANGED)
        assert sample['inputs'].shape == (3, 128, 128)
        assert len(instances) >= 1
        for label, mask in zip(instances.labels.tolist(), instances.masks.masks, strict=True):
            assert (semantic[mask.astype(bool)] == label + 1).all()


@pytest.mark.parametrize('split', COUNTS)
def test_mmseg_reads_scenes(scenes, split):
    datasets = pytest.importorskip('mmseg.datasets')
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    dataset = datasets.BaseSegDataset(
        data_root=str(scenes),
        metainfo={'classes': ('background', *make_scenes.CLASSES)},
        data_prefix={'img_path': f'images/{split}', 'seg_map_path': f'annotations/{split}'},
        pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}, {'type': 'PackSegInputs'}],
    )
    assert len(dataset) == COUNTS[split]
    for index in range(len(dataset)):
        sample = dataset[index]
        labels = sample['data_samples'].gt_sem_seg.data
        assert sample['inputs'].shape == (3, 128, 128)
        assert labels.shape == (1, 128, 128)
        assert labels.min() == 0 and 1 <= labels.max() <= 10


def test_splits_share_no_article():
    images, labels = make_scenes.read_articles(SOURCE)
    training, validation = make_scenes.split_articles(len(images), seed=0)
    assert not set(training) & set(validation)
    assert sorted([*training, *validation]) == list(range(len(images)))
    assert set(labels[training]) == set(labels[validation]) == set(range(10))
    assert set(validation) != set(make_scenes.split_articles(len(images), seed=1)[1])


def test_scenes_use_only_their_split(tmp_path, monkeypatch):
    seen = {}

    def note(out, split, count, images, labels, size, seed):
        seen[split] = {image.tobytes() for image in images}
        out.mkdir(exist_ok=True)

    monkeypatch.setattr(make_scenes, 'write_split', note)
    run_tool(make_scenes, tmp_path / 'scenes')
    assert len(seen['training']) > len(seen['validation']) > 1000
    assert not seen['training'] & seen['validation']


def test_same_seed_gives_same_bytes(scenes, tmp_path):
    counts = ('--train', COUNTS['training'], '--val', COUNTS['validation'])
    run_tool('make_scenes', tmp_path / 'same', *counts)
    run_tool('make_scenes', tmp_path / 'other', *counts, '--seed', 1)
    expected = read_tree(scenes)
    assert read_tree(tmp_path / 'same') == expected
    other = read_tree(tmp_path / 'other')
    assert other.keys() == expected.keys()
    assert all(other[path] != expected[path] for path in expected)


def test_scene_does_not_depend_on_number_of_scenes(scenes, tmp_path):
    run_tool('make_scenes', tmp_path / 'few', '--train', 2, '--val', 1)
    expected = read_tree(scenes)
    found = read_tree(tmp_path / 'few')
    assert len(found) == 8
    assert all(found[path] == expected[path] for path in found if path.suffix != '.json')


def test_overwrite_replaces_scenes(scenes, tmp_path):
    out = tmp_path / 'scenes'
    shutil.copytree(scenes, out)
    run_tool('make_scenes', out, '--train', 1, '--val', 1, '--size', 64, '--overwrite')
    assert len(read_tree(out)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']


def missing_labels(folder):
    write_source(folder / 'source', 40)
    (folder / 'source' / LABELS).unlink()
    return ['--source', folder / 'source']


def truncated_images(folder):
    path = write_source(folder / 'source', 40) / IMAGES
    path.write_bytes(path.read_bytes()[:-20])
    return ['--source', folder / 'source']


def not_gzip(folder):
    (write_source(folder / 'source', 40) / IMAGES).write_bytes(b'plain text')
    return ['--source', folder / 'source']


def not_idx(folder):
    (write_source(folder / 'source', 40) / LABELS).write_bytes(gzip.compress(b'no'))
    return ['--source', folder / 'source']


def shorter_than_header(folder):
    header = b'\0\0\x08\x01' + (40).to_bytes(4, 'big')
    (write_source(folder / 'source', 40) / LABELS).write_bytes(gzip.compress(header + bytes(39)))
    return ['--source', folder / 'source']


def fewer_labels_than_images(folder):
    write_source(folder / 'other', 30)
    shutil.copy(folder / 'other' / LABELS, write_source(folder / 'source', 40) / LABELS)
    return ['--source', folder / 'source']


def too_few_articles(folder):
    return ['--source', write_source(folder / 'source', 19)]


@pytest.mark.parametrize(
    ('prepare', 'message'),
    [
        (missing_source, 'is missing'),
        (missing_labels, f'{LABELS} is missing'),
        (truncated_images, f'{IMAGES} cannot be read'),
        (not_gzip, f'{IMAGES} cannot be read'),
        (not_idx, 'not an idx file'),
        (shorter_than_header, 'header promises'),
        (fewer_labels_than_images, 'do not belong together'),
        (too_few_articles, 'too few articles'),
        *BAD_FOLDERS,
        (lambda folder: ['--size', 63], 'too small'),
        (lambda folder: ['--train', 0], 'at least one scene'),
        (lambda folder: ['--seed', -1], 'negative'),
    ],
)
def test_bad_input(tmp_path, prepare, message):
    arguments = prepare(tmp_path)
    before = sorted(tmp_path.rglob('*')), read_tree(tmp_path)
    assert message in sentence('make_scenes', tmp_path / 'out', *arguments)
    assert (sorted(tmp_path.rglob('*')), read_tree(tmp_path)) == before


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, image):
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(make_scenes, 'write_image', fail)
    assert 'No space left' in sentence(make_scenes, tmp_path / 'out')
    assert not list(tmp_path.iterdir())

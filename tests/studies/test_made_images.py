"""studies.make_scenes and studies.make_reid: what they compose of articles, and what they refuse."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from pycocotools import mask as coco_mask

from helpers import ROOT
from mmdenoiserep.datasets.reid_datasets import Market1501
from studies import make_reid, make_scenes
from tools_helpers import run_tool, sentence

IMAGES = 't10k-images-idx3-ubyte.gz'
LABELS = 't10k-labels-idx1-ubyte.gz'
COUNTS = {'training': 6, 'validation': 3}
SMALL = dict(make_scenes=['--train', 6, '--val', 3], make_reid=['--ids', 5, '--test-ids', 3, '--cameras', 3])


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Small outputs of both, by the name of the module."""
    folder = tmp_path_factory.mktemp('made')
    for name, words in SMALL.items():
        run_tool(name, folder / name, *words)
    assert {path.name for path in folder.iterdir()} == set(SMALL), 'nothing temporary stays'
    return {name: folder / name for name in SMALL}


def read_tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('split', COUNTS)
def test_masks_agree_with_semantic_map(made, split):
    scenes = made['make_scenes']
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
def test_mmdet_and_mmseg_read_scenes(made, split):
    scenes = made['make_scenes']
    init_default_scope('mmdet')
    detection = CocoDataset(
        data_root=str(scenes),
        metainfo=dict(classes=make_scenes.CLASSES),
        ann_file=f'annotations/instances_{split}.json',
        data_prefix=dict(img=f'images/{split}'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_id',)),
        ],
    )
    detected = list(detection)
    init_default_scope('mmseg')
    segmentation = BaseSegDataset(
        data_root=str(scenes),
        metainfo=dict(classes=('background', *make_scenes.CLASSES)),
        data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    )
    assert len(detection) == len(segmentation) == COUNTS[split]
    for found, segmented in zip(detected, segmentation, strict=True):
        semantic = segmented['data_samples'].gt_sem_seg.data
        assert found['inputs'].shape == segmented['inputs'].shape == (3, 128, 128)
        assert semantic.shape == (1, 128, 128) and semantic.min() == 0 and 1 <= semantic.max() <= 10
        instances = found['data_samples'].gt_instances
        assert len(instances) >= 1
        for label, mask in zip(instances.labels.tolist(), instances.masks.masks, strict=True):
            assert (semantic[0].numpy()[mask.astype(bool)] == label + 1).all()


def test_splits_share_no_article(tmp_path, monkeypatch):
    images, labels = make_scenes.read_articles(ROOT / 'demo/fashion-mnist')
    training, validation = make_scenes.split_articles(len(images), seed=0)
    assert not set(training) & set(validation)
    assert sorted([*training, *validation]) == list(range(len(images)))
    assert set(labels[training]) == set(labels[validation]) == set(range(10))
    assert set(validation) != set(make_scenes.split_articles(len(images), seed=1)[1])
    seen = {}

    def note(out, split, count, images, labels, size, seed):
        seen[split] = {image.tobytes() for image in images}
        out.mkdir(exist_ok=True)

    monkeypatch.setattr(make_scenes, 'write_split', note)
    run_tool(make_scenes, tmp_path / 'scenes')
    assert len(seen['training']) > len(seen['validation']) > 1000
    assert not seen['training'] & seen['validation']


def samples(folder, split):
    """Returns identity, camera and article of the images as Market1501 reads them."""
    dataset = Market1501(str(folder), split)
    known = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [(item['pid'], item['camid'], int(Path(item['img_path']).name.split('_')[2])) for item in known]


def test_market1501_reads_identities_of_one_article_each(made):
    """Each camera sees each identity twice, and once more as a query; the distractors come on top."""
    train, query, gallery = (samples(made['make_reid'], split) for split in ('train', 'query', 'gallery'))
    people = [item for item in gallery if item[0] != 0]
    assert Counter(item[:2] for item in train) == {(pid, camera): 2 for pid in range(1, 6) for camera in range(3)}
    assert Counter(item[:2] for item in query) == {(pid, camera): 1 for pid in range(6, 9) for camera in range(3)}
    assert Counter(item[:2] for item in people) == {(pid, camera): 2 for pid in range(6, 9) for camera in range(3)}
    assert Counter(item[1] for item in gallery if item[0] == 0) == dict.fromkeys(range(3), make_reid.DISTRACTORS)
    articles = {}
    for pid, _, article in train + query + gallery:
        articles.setdefault(pid, set()).add(article)
    distractors = articles.pop(0)
    assert len(distractors) == make_reid.DISTRACTORS
    assert all(len(own) == 1 for own in articles.values()) and len(articles) == 8
    assert len(set.union(distractors, *articles.values())) == make_reid.DISTRACTORS + 8


def test_images_have_the_size_and_differ(made):
    contents = read_tree(made['make_reid'])
    for path in contents:
        image = cv2.imread(str(made['make_reid'] / path), cv2.IMREAD_UNCHANGED)
        assert image.shape == (64, 48, 3) and image.std() > 5
    assert len(set(contents.values())) == len(contents) == 30 + 9 + 18 + 3 * make_reid.DISTRACTORS


def test_the_default_counts(tmp_path, monkeypatch):
    plans = []

    def note(folder, images, *_):
        plans.append(images)
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(make_reid, 'write_images', note)
    run_tool(make_reid, tmp_path / 'out')
    assert [len(images) for images in plans] == [4000, 800, 1600 + 4 * make_reid.DISTRACTORS]
    assert [len({image[0] for image in images}) for images in plans] == [500, 200, 201]


def test_cameras_matter(tmp_path):
    """Of raw pixels, the nearest image in the gallery has the camera of the query far more often than its identity."""
    run_tool('make_reid', tmp_path / 'out', '--ids', 1, '--test-ids', 40)
    vectors, known = {}, {}
    for split in ('query', 'gallery'):
        dataset = Market1501(str(tmp_path / 'out'), split)
        paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
        pixels = np.stack([cv2.imread(path).ravel() for path in paths]).astype(float)
        vectors[split] = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
        known[split] = np.array([item[:2] for item in samples(tmp_path / 'out', split)])
    pids, cameras = (np.equal.outer(known['query'][:, i], known['gallery'][:, i]) for i in (0, 1))
    similarity = vectors['query'] @ vectors['gallery'].T
    nearest = np.arange(len(similarity)), similarity.argmax(1)
    assert cameras[nearest].mean() > 0.8
    similarity[pids & cameras] = -1
    assert pids[np.arange(len(similarity)), similarity.argmax(1)].mean() < 0.2


@pytest.mark.parametrize('name', SMALL)
def test_the_seed_decides(name, made, tmp_path):
    run_tool(name, tmp_path / 'same', *SMALL[name])
    run_tool(name, tmp_path / 'other', *SMALL[name], '--seed', 1)
    expected, other = read_tree(made[name]), read_tree(tmp_path / 'other')
    assert read_tree(tmp_path / 'same') == expected
    assert len(other) == len(expected) and not set(other.values()) & set(expected.values())


@pytest.mark.parametrize(
    ('name', 'words', 'pattern', 'count'),
    [
        ('make_scenes', ['--train', 2, '--val', 1], '*/*/*.*', 6),
        ('make_reid', ['--ids', 2, '--cameras', 2, '--per-camera', 1], 'bounding_box_train/*', 4),
    ],
)
def test_an_image_does_not_depend_on_the_number_of_images(name, words, pattern, count, made, tmp_path):
    run_tool(name, tmp_path / 'few', *SMALL[name], *words)
    found = [path.relative_to(tmp_path / 'few') for path in (tmp_path / 'few').glob(pattern)]
    assert len(found) == count
    assert all((made[name] / path).read_bytes() == (tmp_path / 'few' / path).read_bytes() for path in found)


@pytest.mark.parametrize(
    ('name', 'words', 'count'),
    [
        ('make_scenes', ['--train', 1, '--val', 1, '--size', 64], 6),
        ('make_reid', ['--ids', 1, '--test-ids', 1, '--cameras', 2, '--size', 32], 10 + 2 * make_reid.DISTRACTORS),
    ],
)
def test_overwrite_replaces_the_images(name, words, count, made, tmp_path):
    shutil.copytree(made[name], tmp_path / 'out')
    run_tool(name, tmp_path / 'out', *words, '--overwrite')
    assert len(read_tree(tmp_path / 'out')) == count
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    if name == 'make_reid':
        assert cv2.imread(str(next((tmp_path / 'out/query').iterdir()))).shape == (32, 24, 3)


def idx(content, *shape):
    header = b'\0\0\x08' + bytes([len(shape)]) + b''.join(size.to_bytes(4, 'big') for size in shape)
    return gzip.compress(header + content)


def source(count=40, **changes):
    """Returns what writes a source of plain squares of class 0, in which files are replaced, or left out for None."""

    def prepare(folder):
        square = np.pad(np.full((16, 16), 200, np.uint8), 6)
        files = dict(images=idx(square.tobytes() * count, count, 28, 28), labels=idx(bytes(count), count)) | changes
        (folder / 'source').mkdir()
        for name, content in zip((IMAGES, LABELS), files.values(), strict=True):
            if content is not None:
                (folder / 'source' / name).write_bytes(content)
        return ['--source', folder / 'source']

    return prepare


def taken(file, *words):
    """Returns what fills the target with something precious, or puts a file in its place."""

    def prepare(folder):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text('precious')
        return words

    return prepare


BAD_FOLDERS = [
    (taken('out/images'), 'is not empty; name another folder, or pass --overwrite'),
    (taken('out/thesis.txt', '--overwrite'), 'holds thesis.txt, which --overwrite would delete'),
    (taken('out', '--overwrite'), 'not a folder'),
]
BAD = dict(
    make_scenes=[
        (['--source', 'nowhere'], 'is missing'),
        (source(labels=None), f'{LABELS} is missing'),
        (source(images=idx(bytes(40 * 784), 40, 28, 28)[:-20]), f'{IMAGES} cannot be read'),
        (source(images=b'plain text'), f'{IMAGES} cannot be read'),
        (source(labels=gzip.compress(b'no')), 'not an idx file'),
        (source(labels=idx(bytes(39), 40)), 'header promises'),
        (source(labels=idx(bytes(30), 30)), 'do not belong together'),
        (source(19), 'too few articles'),
        *BAD_FOLDERS,
        (['--size', 63], 'too small'),
        (['--train', 0], 'at least one scene'),
        (['--seed', -1], 'negative'),
    ],
    make_reid=[
        (['--source', 'nowhere'], f'{IMAGES} is missing'),
        (source(724), 'has 724 articles, 725 are needed'),
        *BAD_FOLDERS,
        (['--ids', 0], 'at least one identity each'),
        (['--test-ids', 0], 'at least one identity each'),
        (['--cameras', 1], '--cameras 1 does not work'),
        (['--cameras', 10], '--cameras 10 does not work'),
        (['--per-camera', 0], 'at least one image'),
        (['--size', 31], '--size 31 is too small'),
        (['--seed', -1], 'negative'),
    ],
)


@pytest.mark.parametrize(('name', 'prepare', 'message'), [(name, *case) for name in BAD for case in BAD[name]])
def test_bad_input(tmp_path, name, prepare, message):
    words = prepare(tmp_path) if callable(prepare) else prepare
    before = sorted(tmp_path.rglob('*')), read_tree(tmp_path)
    assert message in sentence(name, tmp_path / 'out', *words)
    assert (sorted(tmp_path.rglob('*')), read_tree(tmp_path)) == before


@pytest.mark.parametrize('module', [make_scenes, make_reid])
def test_failure_while_writing_leaves_nothing(module, tmp_path, monkeypatch):
    def fail(path, image):
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(module, 'write_image', fail)
    assert 'No space left' in sentence(module, tmp_path / 'out')
    assert not list(tmp_path.iterdir())

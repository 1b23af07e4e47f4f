"""Tests of studies/make_reid.py."""

import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from articles import BAD_FOLDERS, IMAGES, missing_source, read_tree, write_source
from mmdenoiserep.datasets.reid_datasets import Market1501
from studies import make_reid
from tools_helpers import run_tool, sentence

FEW = ('--ids', 5, '--test-ids', 3, '--cameras', 3)


def samples(folder, split):
    """Returns identity, camera and article of the images as Market1501 reads them."""
    dataset = Market1501(str(folder), split)
    known = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [(item['pid'], item['camid'], int(Path(item['img_path']).name.split('_')[2])) for item in known]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A small output."""
    out = tmp_path_factory.mktemp('made') / 'reid'
    run_tool('make_reid', out, *FEW)
    assert [path.name for path in out.parent.iterdir()] == ['reid'], 'nothing temporary stays'
    return out


def test_market1501_reads_it(made):
    train, query, gallery = (samples(made, split) for split in ('train', 'query', 'gallery'))
    people = [item for item in gallery if item[0] != 0]
    assert Counter(item[:2] for item in train) == {(pid, camera): 2 for pid in range(1, 6) for camera in range(3)}
    assert Counter(item[:2] for item in query) == {(pid, camera): 1 for pid in range(6, 9) for camera in range(3)}
    assert Counter(item[:2] for item in people) == {(pid, camera): 2 for pid in range(6, 9) for camera in range(3)}
    distractors = Counter(item[1] for item in gallery if item[0] == 0)
    assert distractors == dict.fromkeys(range(3), make_reid.DISTRACTORS)


def test_an_article_is_one_identity(made):
    train, query, gallery = (samples(made, split) for split in ('train', 'query', 'gallery'))
    articles = {}
    for pid, _, article in train + query + gallery:
        articles.setdefault(pid, set()).add(article)
    distractors = articles.pop(0)
    assert len(distractors) == make_reid.DISTRACTORS
    assert all(len(own) == 1 for own in articles.values()) and len(articles) == 8
    assert len(set.union(distractors, *articles.values())) == make_reid.DISTRACTORS + 8


def test_images_have_the_size_and_differ(made):
    contents = read_tree(made)
    for path in contents:
        image = cv2.imread(str(made / path), cv2.IMREAD_UNCHANGED)
        assert image.shape == (64, 48, 3) and image.std() > 5
    assert len(set(contents.values())) == len(contents) == 30 + 9 + 18 + 3 * make_reid.DISTRACTORS


def test_the_default_counts(tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(
        make_reid,
        'write_images',
        lambda folder, images, *_: plans.append(images) or folder.mkdir(parents=True, exist_ok=True),
    )
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


def test_same_seed_gives_same_bytes(made, tmp_path):
    run_tool('make_reid', tmp_path / 'same', *FEW)
    run_tool('make_reid', tmp_path / 'other', *FEW, '--seed', 1)
    expected = read_tree(made)
    assert read_tree(tmp_path / 'same') == expected
    assert not set(read_tree(tmp_path / 'other').values()) & set(expected.values())


def test_an_image_does_not_depend_on_the_number_of_images(made, tmp_path):
    run_tool('make_reid', tmp_path / 'few', *FEW, '--ids', 2, '--cameras', 2, '--per-camera', 1)
    train = {path.name: path.read_bytes() for path in (tmp_path / 'few/bounding_box_train').iterdir()}
    assert len(train) == 4
    assert all((made / 'bounding_box_train' / name).read_bytes() == content for name, content in train.items())


def test_overwrite_replaces_the_images(made, tmp_path):
    out = tmp_path / 'reid'
    shutil.copytree(made, out)
    run_tool('make_reid', out, '--ids', 1, '--test-ids', 1, '--cameras', 2, '--size', 32, '--overwrite')
    assert len(read_tree(out)) == 4 + 2 + 4 + 2 * make_reid.DISTRACTORS
    assert [path.name for path in tmp_path.iterdir()] == ['reid']
    assert cv2.imread(str(next((out / 'query').iterdir()))).shape == (32, 24, 3)


def too_few_articles(folder):
    return ['--source', write_source(folder / 'source', 724)]


@pytest.mark.parametrize(
    ('prepare', 'message'),
    [
        (missing_source, f'{IMAGES} is missing'),
        (too_few_articles, 'has 724 articles, 725 are needed'),
        *BAD_FOLDERS,
        (lambda folder: ['--ids', 0], 'at least one identity each'),
        (lambda folder: ['--test-ids', 0], 'at least one identity each'),
        (lambda folder: ['--cameras', 1], '--cameras 1 does not work'),
        (lambda folder: ['--cameras', 10], '--cameras 10 does not work'),
        (lambda folder: ['--per-camera', 0], 'at least one image'),
        (lambda folder: ['--size', 31], '--size 31 is too small'),
        (lambda folder: ['--seed', -1], 'negative'),
    ],
)
def test_bad_input(tmp_path, prepare, message):
    arguments = prepare(tmp_path)
    before = sorted(tmp_path.rglob('*')), read_tree(tmp_path)
    assert message in sentence('make_reid', tmp_path / 'out', *arguments)
    assert (sorted(tmp_path.rglob('*')), read_tree(tmp_path)) == before


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, image):
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(make_reid, 'write_image', fail)
    assert 'No space left' in sentence(make_reid, tmp_path / 'out')
    assert not list(tmp_path.iterdir())

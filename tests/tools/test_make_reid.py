"""Tests of tools/make_reid.py."""

import gzip
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers import ROOT
from mmdenoiserep.datasets.reid_datasets import Market1501

TOOL = ROOT / 'tools/make_reid.py'
sys.path.append(str(ROOT / 'tools'))

import make_reid  # noqa: E402
from launch import launch  # noqa: E402

IMAGES = 't10k-images-idx3-ubyte.gz'
LABELS = 't10k-labels-idx1-ubyte.gz'
FEW = ('--ids', 5, '--test-ids', 3, '--cameras', 3)


def run_tool(*arguments):
    """Runs the tool and returns the finished process."""
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def read_tree(folder):
    """Returns the bytes of every file below a folder, by relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def write_source(folder, count):
    """Writes a source of the given number of articles, all plain squares of class 0."""
    folder.mkdir()
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 6:22, 6:22] = 200
    header = b''.join(size.to_bytes(4, 'big') for size in images.shape)
    (folder / IMAGES).write_bytes(gzip.compress(b'\0\0\x08\x03' + header + images.tobytes()))
    (folder / LABELS).write_bytes(gzip.compress(b'\0\0\x08\x01' + count.to_bytes(4, 'big') + bytes(count)))
    return folder


def samples(folder, split):
    """Returns identity, camera and article of the images as Market1501 reads them."""
    dataset = Market1501(str(folder), split)
    known = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [(item['pid'], item['camid'], int(Path(item['img_path']).name.split('_')[2])) for item in known]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A small output of the tool."""
    out = tmp_path_factory.mktemp('made') / 'reid'
    done = run_tool(out, *FEW)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ['reid'], 'nothing temporary stays'
    return out


def test_market1501_reads_it(made):
    """Each camera sees each identity twice, and once more as a query; the distractors come on top."""
    train, query, gallery = (samples(made, split) for split in ('train', 'query', 'gallery'))
    people = [item for item in gallery if item[0] != 0]
    assert Counter(item[:2] for item in train) == {(pid, camera): 2 for pid in range(1, 6) for camera in range(3)}
    assert Counter(item[:2] for item in query) == {(pid, camera): 1 for pid in range(6, 9) for camera in range(3)}
    assert Counter(item[:2] for item in people) == {(pid, camera): 2 for pid in range(6, 9) for camera in range(3)}
    distractors = Counter(item[1] for item in gallery if item[0] == 0)
    assert distractors == dict.fromkeys(range(3), make_reid.DISTRACTORS)


def test_an_article_is_one_identity(made):
    """Training, testing and distractors share no article."""
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
        'write_folder',
        lambda folder, images, *_: plans.append(images) or folder.mkdir(parents=True, exist_ok=True),
    )
    monkeypatch.setattr(sys, 'argv', ['make_reid.py', str(tmp_path / 'out')])
    launch(make_reid.main)
    assert [len(images) for images in plans] == [4000, 800, 1600 + 4 * make_reid.DISTRACTORS]
    assert [len({image[0] for image in images}) for images in plans] == [500, 200, 201]


def test_cameras_matter(tmp_path):
    """Of raw pixels, the nearest image in the gallery has the camera of the query far more often than its identity."""
    assert run_tool(tmp_path / 'out', '--ids', 1, '--test-ids', 40).returncode == 0
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
    assert run_tool(tmp_path / 'same', *FEW).returncode == 0
    assert run_tool(tmp_path / 'other', *FEW, '--seed', 1).returncode == 0
    expected = read_tree(made)
    assert read_tree(tmp_path / 'same') == expected
    assert not set(read_tree(tmp_path / 'other').values()) & set(expected.values())


def test_an_image_does_not_depend_on_the_number_of_images(made, tmp_path):
    assert run_tool(tmp_path / 'few', *FEW, '--ids', 2, '--cameras', 2, '--per-camera', 1).returncode == 0
    train = {path.name: path.read_bytes() for path in (tmp_path / 'few/bounding_box_train').iterdir()}
    assert len(train) == 4
    assert all((made / 'bounding_box_train' / name).read_bytes() == content for name, content in train.items())


def test_overwrite_replaces_the_images(made, tmp_path):
    out = tmp_path / 'reid'
    shutil.copytree(made, out)
    done = run_tool(out, '--ids', 1, '--test-ids', 1, '--cameras', 2, '--size', 32, '--overwrite')
    assert done.returncode == 0, done.stderr
    assert len(read_tree(out)) == 4 + 2 + 4 + 2 * make_reid.DISTRACTORS
    assert [path.name for path in tmp_path.iterdir()] == ['reid']
    assert cv2.imread(str(next((out / 'query').iterdir()))).shape == (32, 24, 3)


def missing_source(folder):
    return ['--source', folder / 'nowhere']


def too_few_articles(folder):
    return ['--source', write_source(folder / 'source', 724)]


def folder_not_empty(folder):
    (folder / 'out').mkdir()
    (folder / 'out/query').write_text('precious')
    return []


def folder_of_something_else(folder):
    (folder / 'out').mkdir()
    (folder / 'out/thesis.txt').write_text('precious')
    return ['--overwrite']


def file_in_place_of_folder(folder):
    (folder / 'out').write_text('precious')
    return ['--overwrite']


@pytest.mark.parametrize(
    ('prepare', 'message'),
    [
        (missing_source, f'{IMAGES} is missing'),
        (too_few_articles, 'has 724 articles, 725 are needed'),
        (folder_not_empty, 'is not empty; name another folder, or pass --overwrite'),
        (folder_of_something_else, 'holds thesis.txt, which --overwrite would delete'),
        (file_in_place_of_folder, 'not a folder'),
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
    done = run_tool(tmp_path / 'out', *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith('make_reid: ') and message in done.stderr
    assert done.stderr.count('\n') == 1
    assert (sorted(tmp_path.rglob('*')), read_tree(tmp_path)) == before


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, image):
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(make_reid, 'write_image', fail)
    monkeypatch.setattr(sys, 'argv', ['make_reid.py', str(tmp_path / 'reid')])
    with pytest.raises(SystemExit, match='make_reid: .*No space left'):
        launch(make_reid.main)
    assert not list(tmp_path.iterdir())


def test_help():
    done = run_tool('--help')
    assert done.returncode == 0 and '--per-camera' in done.stdout

"""Tests of studies/prepare_fashion_mnist.py."""

import gzip

import numpy as np
import pytest
from mmpretrain.datasets import FashionMNIST

from helpers import ROOT
from tools_helpers import run_tool, sentence

SHIPPED = ROOT / 'demo/fashion-mnist'
PARTS = 'images-idx3', 'labels-idx1'


def read(out, split):
    """Reads a split as mmpretrain does: images (N, 28, 28) and labels (N,)."""
    data = FashionMNIST(data_root=str(out), split=split, test_mode=split == 'test', download=False)
    items = [data[i] for i in range(len(data))]
    return np.stack([item['img'] for item in items]), np.array([item['gt_label'] for item in items])


def write_split(folder, split, images, labels):
    """Writes gzipped idx files as Fashion-MNIST is distributed."""
    folder.mkdir(exist_ok=True)
    for part, array in zip(PARTS, (images, labels), strict=True):
        header = bytes([0, 0, 8, array.ndim]) + b''.join(size.to_bytes(4, 'big') for size in array.shape)
        (folder / f'{split}-{part}-ubyte.gz').write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def random_split(count, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 10


@pytest.fixture
def both_splits(tmp_path):
    """A source in the layout of Debian's package, 30 training and 20 test images."""
    write_split(tmp_path / 'source', 'train', *random_split(30, 0))
    write_split(tmp_path / 'source', 't10k', *random_split(20, 1))
    return tmp_path / 'source'


def test_a_source_with_both_splits_is_taken_as_it_is(both_splits, tmp_path, capsys):
    run_tool('prepare_fashion_mnist', tmp_path / 'new/out', '--source', both_splits)
    printed = capsys.readouterr().out
    assert 'train: 30 images, 3 to 3 of each of 10 classes' in printed
    assert 't10k: 20 images, 2 to 2 of each of 10 classes' in printed
    assert str(both_splits) in printed
    for split, (images, labels) in {'train': random_split(30, 0), 'test': random_split(20, 1)}.items():
        read_images, read_labels = read(tmp_path / 'new/out', split)
        assert (read_images == images).all() and (read_labels == labels).all()
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['out'], 'nothing temporary stays'
    assert len(list((tmp_path / 'new/out').iterdir())) == 4


def test_the_shipped_images_are_divided(tmp_path, capsys):
    run_tool('prepare_fashion_mnist', tmp_path / 'out', '--source', SHIPPED)
    printed = capsys.readouterr().out
    assert 'train: 8000 images, 776 to 827 of each' in printed
    assert 't10k: 2000 images, 173 to 224 of each' in printed
    (train, train_labels), (test, test_labels) = read(tmp_path / 'out', 'train'), read(tmp_path / 'out', 'test')
    whole = gzip.decompress((SHIPPED / 't10k-images-idx3-ubyte.gz').read_bytes())[16:]
    assert train.tobytes() + test.tobytes() == whole
    labels = gzip.decompress((SHIPPED / 't10k-labels-idx1-ubyte.gz').read_bytes())[8:]
    assert bytes([*train_labels, *test_labels]) == labels


def test_overwrite(both_splits, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'train-images-idx3-ubyte').write_text('old')
    assert 'not empty' in sentence('prepare_fashion_mnist', out, '--source', both_splits)
    assert (out / 'train-images-idx3-ubyte').read_text() == 'old'
    run_tool('prepare_fashion_mnist', out, '--source', both_splits, '--overwrite')
    assert len(read(out, 'train')[0]) == 30
    (out / 'thesis.txt').write_text('precious')
    assert 'holds thesis.txt' in sentence('prepare_fashion_mnist', out, '--source', both_splits, '--overwrite')
    assert (out / 'thesis.txt').read_text() == 'precious'


TRAIN, TEST = random_split(30, 0), random_split(20, 1)
NO_BAGS = [array[TRAIN[1] != 8] for array in TRAIN]


def remove(*patterns):
    """Returns what removes files from a source."""
    return lambda source: [path.unlink() for pattern in patterns for path in source.glob(pattern)]


def cut(source):
    path = source / 't10k-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (remove('train-labels-*'), 'train-labels-idx1-ubyte.gz is missing'),
        (remove('*'), 't10k-images-idx3-ubyte.gz is missing'),
        (cut, 't10k-images-idx3-ubyte.gz cannot be read'),
        (lambda source: write_split(source, 'train', TRAIN[0], TRAIN[1][:29]), 'do not belong together'),
        (lambda source: write_split(source, 't10k', TEST[0], np.minimum(TEST[1] + 2, 10)), 'do not belong together'),
        (lambda source: write_split(source, 'train', *NO_BAGS), 'the train split of'),
        (remove('train-*'), 'the t10k split of'),
    ],
)
def test_bad_sources(both_splits, tmp_path, spoil, message):
    spoil(both_splits)
    assert message in sentence('prepare_fashion_mnist', tmp_path / 'out', '--source', both_splits)
    assert [path.name for path in tmp_path.iterdir()] == ['source'], 'nothing is left behind'

"""tools/corrupt_images.py: copies of a folder, spoiled the same way every time."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

import corrupt_images  # noqa: E402
from launch import launch  # noqa: E402


@pytest.fixture
def images(tmp_path):
    """A folder with two smooth pictures, one of them in a folder of its own."""
    ramp = np.linspace(20, 230, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    (tmp_path / 'images/deep').mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'images/a.png'), ramp)
    cv2.imwrite(str(tmp_path / 'images/deep/b.jpg'), ramp[::-1])
    return tmp_path / 'images'


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['corrupt_images.py', *map(str, args)])
    launch(corrupt_images.main)


def sentence(monkeypatch, *args):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *args)
    return stopped.value.code


def read(folder):
    return {p.relative_to(folder).as_posix(): cv2.imread(str(p)).astype(float) for p in folder.rglob('*.*')}


def test_names_stay_and_the_seed_decides(images, tmp_path, monkeypatch):
    before = read(images)
    for out, seed in (('one', 0), ('again', 0), ('other', 5)):
        run(monkeypatch, images, tmp_path / out, 'noise', '--severity', 0.1, '--seed', seed)
    one, again, other = (read(tmp_path / out) for out in ('one', 'again', 'other'))
    assert one.keys() == before.keys() == {'a.png', 'deep/b.jpg'}
    for name in before:
        assert np.array_equal(one[name], again[name]) and not np.array_equal(one[name], other[name])
        deviation = (one[name] - before[name])[8:40].std()  # away from the clipped ends of the ramp
        assert 0.9 < deviation / 25.5 < 1.1
    assert not np.array_equal((one['a.png'] - before['a.png']), (one['deep/b.jpg'] - before['deep/b.jpg'])[::-1])


def test_an_output_is_replaced_only_when_asked_for(images, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    run(monkeypatch, images, out, 'blur')
    blurred = read(out)
    assert 'exists' in sentence(monkeypatch, images, out, 'contrast')
    run(monkeypatch, images, out, 'contrast', '--overwrite')
    assert read(out)['a.png'].std() < 0.6 * blurred['a.png'].std()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 'out'], 'nothing is left behind'
    for name in ('mine.png', 'deep/mine.jpg', 'thesis.txt'):
        (out / name).touch()
        assert 'which --overwrite would delete' in sentence(monkeypatch, images, out, 'blur', '--overwrite')
        (out / name).unlink()
    assert len(read(out)) == 2


def test_bad_input_leaves_nothing(images, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    assert '--severity 400 does not work for jpeg' in sentence(monkeypatch, images, out, 'jpeg', '--severity', 400)
    assert 'holds the images themselves' in sentence(monkeypatch, images, images, 'blur', '--overwrite')
    assert 'holds the images themselves' in sentence(monkeypatch, images, tmp_path, 'blur', '--overwrite')
    assert 'is not a folder' in sentence(monkeypatch, tmp_path / 'no', out, 'blur')
    (images / 'broken.png').write_bytes(b'no picture')
    assert 'broken.png cannot be read' in sentence(monkeypatch, images, out, 'blur')
    assert [path.name for path in tmp_path.iterdir()] == ['images']

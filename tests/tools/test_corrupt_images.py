"""tools/corrupt_images.py: copies of a folder, spoiled the same way every time."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from tools_helpers import find_tool, python, run_tool, sentence


@pytest.fixture
def images(tmp_path):
    """A folder with two smooth pictures, one of them in a folder of its own."""
    ramp = np.linspace(20, 230, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    (tmp_path / 'images/deep').mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'images/a.png'), ramp)
    cv2.imwrite(str(tmp_path / 'images/deep/b.jpg'), ramp[::-1])
    return tmp_path / 'images'


def read(folder):
    return {p.relative_to(folder).as_posix(): cv2.imread(str(p)).astype(float) for p in folder.rglob('*.*')}


def test_names_stay_and_the_seed_decides(images, tmp_path):
    before = read(images)
    for out, seed in (('one', 0), ('again', 0), ('other', 5)):
        run_tool('corrupt_images', images, tmp_path / out, 'noise', '--severity', 0.1, '--seed', seed)
    one, again, other = (read(tmp_path / out) for out in ('one', 'again', 'other'))
    assert one.keys() == before.keys() == {'a.png', 'deep/b.jpg'}
    for name in before:
        assert np.array_equal(one[name], again[name]) and not np.array_equal(one[name], other[name])
        deviation = (one[name] - before[name])[8:40].std()  # away from the clipped ends of the ramp
        assert 0.9 < deviation / 25.5 < 1.1
    assert not np.array_equal((one['a.png'] - before['a.png']), (one['deep/b.jpg'] - before['deep/b.jpg'])[::-1])


def test_an_output_is_replaced_only_when_asked_for(images, tmp_path):
    out = tmp_path / 'out'
    run_tool('corrupt_images', images, out, 'blur')
    blurred = read(out)
    assert 'exists' in sentence('corrupt_images', images, out, 'contrast')
    run_tool('corrupt_images', images, out, 'contrast', '--overwrite')
    assert read(out)['a.png'].std() < 0.6 * blurred['a.png'].std()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 'out'], 'nothing is left behind'
    for name in ('mine.png', 'deep/mine.jpg', 'thesis.txt'):
        (out / name).touch()
        assert 'which --overwrite would delete' in sentence('corrupt_images', images, out, 'blur', '--overwrite')
        (out / name).unlink()
    assert len(read(out)) == 2


def test_seeds_and_images_share_no_noise(tmp_path):
    (tmp_path / 'images').mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / f'images/{i}.png'), np.full((16, 16), 128, np.uint8))
    for seed in range(3):
        run_tool('corrupt_images', tmp_path / 'images', tmp_path / f'seed_{seed}', 'noise', '--seed', seed)
    files = [path.read_bytes() for path in tmp_path.glob('seed_*/*.png')]
    assert len(files) == len(set(files)) == 12


@pytest.mark.parametrize('name', [b'\xd6\xd0\xce\xc4.png', b'caf\xe9.PNG', b'\xe5\x86\x8d/\xff.png'])
def test_names_that_are_no_utf8_stay(name, tmp_path, capsys):
    """As GBK and Latin-1 archives unpack, in the folder's own name too."""
    root = os.path.join(os.fsencode(tmp_path), b'\xc4\xe3')
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path))
    with open(path, 'wb') as file:
        file.write(cv2.imencode('.png', np.full((16, 16), 100, np.uint8))[1].tobytes())
    folder, out = os.fsdecode(root), os.fsdecode(root) + '_out'
    run_tool('corrupt_images', folder, out, 'contrast')
    copy = os.path.join(os.fsencode(out), name)
    with open(copy, 'rb') as file:
        assert (cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED) == 50).all()
    with open(path, 'wb') as file:
        file.write(b'broken')
    said = sentence('corrupt_images', folder, out, 'contrast', '--overwrite')
    assert 'cannot be read' in said and said.isprintable() and os.path.exists(copy)


def test_a_name_that_is_no_utf8_is_printed(tmp_path):
    """In a process whose output is strict UTF-8, as in a container or a log file."""
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), np.zeros((16, 16), np.uint8))
    files = find_tool('corrupt_images'), tmp_path / 'images', os.fsdecode(os.fsencode(tmp_path) + b'/\xd6')
    assert '1 images' in python(*files, 'blur', cwd=tmp_path, env=dict(PYTHONIOENCODING='utf-8:strict'))


def test_a_photo_keeps_its_pixel_grid_and_a_grey_image_its_one_channel(tmp_path):
    (tmp_path / 'images').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.full((40, 100, 3), 128, np.uint8)).save(tmp_path / 'images/a.jpg', exif=exif.tobytes())
    cv2.imwrite(str(tmp_path / 'images/b.png'), np.full((200, 200), 30000, np.uint16))
    run_tool('corrupt_images', tmp_path / 'images', tmp_path / 'out', 'noise', '--severity', 0.1)
    photo, stored = (cv2.imread(str(tmp_path / 'out/a.jpg'), flag) for flag in (1, cv2.IMREAD_UNCHANGED))
    assert photo.shape == (100, 40, 3) and stored.shape == (40, 100, 3)
    assert np.array_equal(cv2.rotate(stored, cv2.ROTATE_90_COUNTERCLOCKWISE), photo)
    grey = cv2.imread(str(tmp_path / 'out/b.png'), cv2.IMREAD_UNCHANGED)
    assert grey.dtype == np.uint16 and grey.ndim == 2
    assert grey.std() == pytest.approx(6553.5, rel=0.02) and grey.mean() == pytest.approx(30000, rel=0.01)


def test_bad_input_leaves_nothing(images, tmp_path):
    out = tmp_path / 'out'
    assert 'severity 400 does not work for jpeg' in sentence('corrupt_images', images, out, 'jpeg', '--severity', 400)
    assert 'holds the images themselves' in sentence('corrupt_images', images, images, 'blur', '--overwrite')
    assert 'holds the images themselves' in sentence('corrupt_images', images, tmp_path, 'blur', '--overwrite')
    assert 'lies among the images' in sentence('corrupt_images', images, images / 'noisy', 'noise')
    assert 'is not a folder' in sentence('corrupt_images', tmp_path / 'no', out, 'blur')
    cv2.imwrite(str(images / 'deep.png'), np.zeros((9, 9), np.uint16))
    assert f'{images}/deep.png: jpeg takes 8-bit images' in sentence('corrupt_images', images, out, 'jpeg')
    (images / 'deep.png').unlink()
    (images / 'broken.png').write_bytes(b'no picture')
    assert 'broken.png cannot be read' in sentence('corrupt_images', images, out, 'blur')
    assert [path.name for path in tmp_path.iterdir()] == ['images']

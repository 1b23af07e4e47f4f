"""mmdenoiserep.apis.pixels: image files keep all that is not corrupted, or are refused by name."""

import io
import struct
import zlib

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from mmdenoiserep.apis.pixels import read_stored, to_rgb
from mmdenoiserep.core import InputError

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (24, 36, 3), np.uint8))


def pillow(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opencv(suffix, dtype, channels=()):
    pixels = RNG.integers(0, np.iinfo(dtype).max, (24, 36, *channels), dtype)
    return cv2.imencode(suffix, pixels)[1].tobytes()


def turned(mode='RGB', orientation=6):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, 'Phone'
    return exif.tobytes()


KEPT = {
    'grey.png': opencv('.png', np.uint8),
    'grey.jpg': opencv('.jpg', np.uint8),
    'grey.bmp': opencv('.bmp', np.uint8),
    'grey.ppm': opencv('.pnm', np.uint8),
    'grey.tif': opencv('.tif', np.uint8),
    'deep.png': opencv('.png', np.uint16),
    'deep.tiff': opencv('.tif', np.uint16),
    'deep.ppm': opencv('.pnm', np.uint16),
    'deep_colour.png': opencv('.png', np.uint16, (3,)),
    'deep_alpha.png': opencv('.png', np.uint16, (4,)),
    'deep_colour.tif': opencv('.tif', np.uint16, (3,)),
    'commented.pgm': b'P5 # a camera\n# 255 values\n3 2 #\n255\n' + bytes(range(6)),
    'text.ppm': b'P3\n1 2\n255\n1 2 3 4 5 6\n',
    'alpha.png': opencv('.png', np.uint8, (4,)),
    'alpha.tif': opencv('.tif', np.uint8, (4,)),
    'alpha.webp': opencv('.webp', np.uint8, (4,)),
    'colour.webp': opencv('.webp', np.uint8, (3,)),
    'colour.bmp': opencv('.bmp', np.uint8, (3,)),
    'named_wrongly.jpg': opencv('.png', np.uint8, (4,)),
    'named_wrongly.png': pillow(RGB, 'JPEG', exif=turned()),
    'turned.JPG': pillow(RGB, 'JPEG', exif=turned(), icc_profile=b'profile' * 20000),
    'turned_grey.jpeg': pillow(RGB.convert('L'), 'JPEG', exif=turned(orientation=3)),
    'two_pictures.jpg': pillow(RGB, 'MPO', save_all=True, append_images=[RGB.rotate(180)], exif=turned()),
}
READERS = ('color', 'grayscale', 'unchanged', 'color_ignore_orientation')


@pytest.mark.parametrize('name', KEPT)
def test_what_readers_see_stays(name, tmp_path):
    path, copy = tmp_path / name, tmp_path / f'copy_{name}'
    path.write_bytes(KEPT[name])
    stored = read_stored(path)
    assert np.array_equal(stored.pixels, mmcv.imread(str(path), 'unchanged'))
    if stored.encoder == '.jpg':  # a ramp, which JPEG keeps within rounding
        other = (np.indices(stored.pixels.shape).sum(0) * 2 + 9).astype(np.uint8)
    else:
        other = stored.pixels[::-1].copy()
    copy.write_bytes(stored.encode(other))
    again = read_stored(copy)
    assert again.pixels.dtype == other.dtype and again.pixels.shape == other.shape
    assert np.abs(again.pixels.astype(int) - other).max() <= (3 if stored.encoder == '.jpg' else 0)
    assert again.segments == stored.segments
    for flag in READERS:
        before, after = (mmcv.imread(str(p), flag) for p in (path, copy))
        assert before.shape == after.shape and before.dtype == after.dtype
    with Image.open(path) as before, Image.open(copy) as after:
        assert before.mode == after.mode and before.size == after.size
        if stored.encoder == '.jpg':
            assert dict(before.getexif()) == dict(after.getexif())
            assert before.info.get('icc_profile') == after.info.get('icc_profile')


def broken(data, share):
    return data[: int(len(data) * share)]


def huge(width, height):
    """Returns the head of a PNG of that size."""
    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    chunks = ((b'IHDR', head), (b'IDAT', zlib.compress(b'\0' * 99)), (b'IEND', b''))
    parts = (struct.pack('>I', len(d)) + n + d + struct.pack('>I', zlib.crc32(n + d)) for n, d in chunks)
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


REFUSED = {
    'mask.png': (pillow(RGB.convert('P'), 'PNG'), 'palette'),
    'mask.bmp': (pillow(RGB.convert('P'), 'BMP'), 'palette'),
    'picture.jpg': (pillow(RGB.convert('P'), 'GIF'), 'GIF'),
    'bits.png': (pillow(RGB.convert('1'), 'PNG'), 'bit'),
    'print.jpg': (pillow(RGB.convert('CMYK'), 'JPEG'), 'CMYK'),
    'print.tif': (pillow(RGB.convert('CMYK'), 'TIFF'), 'CMYK'),
    'lab.tif': (pillow(RGB.convert('LAB'), 'TIFF'), 'LAB'),
    'grey_alpha.png': (pillow(RGB.convert('LA'), 'PNG'), 'grey with alpha'),
    'key.png': (pillow(RGB, 'PNG', transparency=(0, 0, 0)), 'RGB'),
    'float.tif': (pillow(Image.fromarray(np.ones((9, 9), np.float32)), 'TIFF'), 'float32'),
    'float_colour.tif': (cv2.imencode('.tif', np.ones((9, 9, 3), np.float32))[1].tobytes(), 'float32'),
    'few.pgm': (b'P5\n# 255\n3 2\n100\n' + bytes(range(6)), 'states 100'),
    'camera.ppm': (b'P6 1 1 4095 ' + bytes(range(6)), 'states 4095'),
    'long.tif': (pillow(Image.fromarray(np.ones((9, 9), np.int32)), 'TIFF'), 'int32'),
    'pages.tif': (pillow(RGB, 'TIFF', save_all=True, append_images=[RGB]), 'pages'),
    'moving.webp': (pillow(RGB, 'WEBP', save_all=True, append_images=[RGB.rotate(180)]), 'pages'),
    'turned.png': (pillow(RGB, 'PNG', exif=turned()), 'orientation'),
    'turned.webp': (pillow(RGB, 'WEBP', exif=turned(), lossless=True), 'orientation'),
    'empty.jpg': (b'', 'empty'),
    'text.png': (b'no picture', 'broken'),
    'huge.png': (huge(50000, 50000), '2^30'),
    'large.png': (huge(15000, 15000), 'broken'),
    'half.jpg': (broken(pillow(RGB.resize((400, 300)), 'JPEG'), 0.5), 'broken'),
    'most.png': (broken(opencv('.png', np.uint8, (3,)), 0.9), 'broken'),
    'half.tif': (broken(opencv('.tif', np.uint16), 0.5), 'broken'),
    'half.webp': (broken(opencv('.webp', np.uint8, (3,)), 0.5), 'broken'),
    'half.bmp': (broken(opencv('.bmp', np.uint8), 0.5), 'broken'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_lost_is_refused_by_name(name, tmp_path):
    data, word = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name) as refused:
        read_stored(tmp_path / name)
    assert word in str(refused.value).replace(str(tmp_path), '') and '\n' not in str(refused.value)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match='gone.png'):
        read_stored(tmp_path / 'gone.png')
    with pytest.raises(InputError, match='directory'):
        read_stored(tmp_path)


def test_people_see_bytes_as_they_are_and_other_values_up_to_their_greatest():
    bgr = RNG.integers(0, 256, (5, 6, 3), np.uint8)
    assert np.array_equal(to_rgb(bgr), bgr[..., ::-1])
    assert np.array_equal(to_rgb(bgr.astype(np.float32)), bgr[..., ::-1])
    alpha = np.dstack([bgr, bgr[..., 0]])
    assert np.array_equal(to_rgb(alpha), bgr[..., ::-1])
    for grey in (bgr[..., 0], bgr[..., :1], bgr[..., :2]):
        assert np.array_equal(to_rgb(grey), np.repeat(bgr[..., :1], 3, 2))
    six = np.concatenate([bgr, bgr], 2)
    assert np.array_equal(to_rgb(six), bgr[..., ::-1])
    deep = np.array([[0, 1024, 4096]], np.uint16)
    assert to_rgb(deep)[0, :, 0].tolist() == [0, 64, 255]
    assert to_rgb(deep / 4096)[0, :, 1].tolist() == [0, 64, 255]
    assert to_rgb(np.array([[-1.0, 0.0, 1.0, np.nan]]))[0, :, 2].tolist() == [0, 128, 255, 128]
    assert to_rgb(np.full((2, 2), 0.5))[0, 0].tolist() == [255] * 3
    for image in (bgr, deep, six):
        assert to_rgb(image).dtype == np.uint8 and to_rgb(image).shape == (*image.shape[:2], 3)

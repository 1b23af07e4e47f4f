"""Pixels of image files as they are stored, and as people see them."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core import InputError

CHANNELS = {'L': 1, 'I': 1, 'I;16': 1, 'I;16B': 1, 'I;16L': 1, 'RGB': 3, 'RGBA': 4}
"""Modes of Pillow whose pixels OpenCV reads and writes without a change, and their channels."""
ODD_MODES = {
    'P': 'with a palette, as masks are',
    '1': 'with one bit a pixel',
    'CMYK': 'in CMYK',
    'LA': 'in grey with alpha',
}
ENCODERS = {'JPEG': '.jpg', 'MPO': '.jpg', 'PNG': '.png', 'BMP': '.bmp', 'PPM': '.pnm', 'TIFF': '.tif', 'WEBP': '.webp'}
"""Format: what OpenCV calls it; it writes ``.pnm`` for grey images too."""
BEST_JPEG = (
    cv2.IMWRITE_JPEG_QUALITY,
    100,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)
OPENCV_LIMIT = 2**30
"""Pixels of the largest image that OpenCV reads."""
ORIENTATION = 0x0112
"""Tag of EXIF."""


@dataclass
class StoredImage:
    """An image file in memory.

    Attributes:
        pixels: (H, W) or (H, W, C), uint8 or uint16, BGR or BGRA, in the order in which they are stored: not turned by
            the orientation in EXIF.
        encoder: Suffix by which OpenCV knows the format of the file, which need not be the suffix of its name.
        segments: EXIF and colour profile of a JPEG file, as they are stored.
    """

    pixels: NDArray[Any]
    encoder: str
    segments: bytes = b''

    def encode(self, pixels: NDArray[Any]) -> bytes:
        """Returns a file in the same format, JPEG at its best, with other pixels of the same shape and dtype."""
        data = cv2.imencode(self.encoder, pixels, BEST_JPEG if self.encoder == '.jpg' else ())[1].tobytes()
        return data[:2] + self.segments + data[2:]


def read_stored(path: Path) -> StoredImage:
    """Reads an image file that can be written again without losing anything but what is done to it.

    Raises:
        InputError: The file can't be read, or what it holds would not be kept: a palette, CMYK, floats, several pages,
            an orientation outside of JPEG, another greatest value of PGM or PPM than that of its type.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f'{path} cannot be read: {error.strerror}') from None
    header = open_header(data)
    pixels = decode(path, data, header)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f'{path} holds {pixels.dtype} values, whose range is not known; convert it to 8 or 16 bits')
    if header is None or header.format not in ENCODERS:
        raise InputError(f'{path} is {header.format if header else "in a format"} that cannot be written; convert it')
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if CHANNELS.get(header.mode) != channels or (header.format == 'BMP' and channels == 4):
        how = ODD_MODES.get(header.mode, f'as {header.format} in {header.mode} with {channels} channels')
        raise InputError(f'{path} is stored {how}, which would be lost; convert it to grey, RGB or RGBA')
    if header.format == 'PPM' and (most := greatest_of_pnm(data)) != np.iinfo(pixels.dtype).max:
        raise InputError(f'{path} states {most} as its greatest value, which would be lost; convert it to 255 or 65535')
    is_jpeg = ENCODERS[header.format] == '.jpg'
    if not is_jpeg and getattr(header, 'n_frames', 1) > 1:
        raise InputError(f'{path} has {header.n_frames} pages, all but one of which would be lost; split it')
    if not is_jpeg and header.getexif().get(ORIENTATION, 1) != 1:
        raise InputError(f'{path} is turned by its EXIF orientation, which only a JPEG keeps; turn its pixels')
    return StoredImage(pixels, ENCODERS[header.format], jpeg_segments(header) if is_jpeg else b'')


def decode(path: Path, data: bytes, header: Any) -> NDArray[Any]:
    """Returns the pixels of a file as they are stored, see :class:`StoredImage`.

    Args:
        path: Of the file; OpenCV does not get it, since a name that is no UTF-8 ends the process.
        data: The file.
        header: Of :func:`open_header`.

    Raises:
        InputError: The file is empty, broken, no image or too large.
    """
    if not data:
        raise InputError(f'{path} cannot be read: it is empty; remove it')
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is not None:
        return pixels
    if header is not None and header.width * header.height > OPENCV_LIMIT:
        size = f'{header.width:,} x {header.height:,}'
        raise InputError(f'{path} cannot be read: {size} pixels are more than the 2^30 of OpenCV; cut it into tiles')
    raise InputError(f'{path} cannot be read: it is broken, cut off or no image; remove it, or mend it')


def greatest_of_pnm(data: bytes) -> int:
    """Returns the greatest value that a PGM or PPM file states: the fourth word, with comments between the words."""
    return int(re.match(rb'(?:(?:\s|#[^\n]*\n)*(\S+)){4}', data)[1])  # type: ignore[index]


def open_header(data: bytes) -> Any:
    """Returns the image file opened by Pillow, whose pixels are not read; None if Pillow does not know it."""
    try:
        with any_size(), warnings.catch_warnings(action='ignore'):
            return Image.open(BytesIO(data))
    except Exception:  # Pillow fails on broken files in many ways
        return None


@contextmanager
def any_size() -> Iterator[None]:
    """Lets Pillow open images of any size, since a header alone is no danger."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def jpeg_segments(header: Any) -> bytes:
    """Returns the segments of EXIF and of the colour profile of a JPEG file as they are stored."""
    kept = [
        (name, content)
        for name, content in header.applist
        if (name, content[:4]) in (('APP1', b'Exif'), ('APP2', b'ICC_'))
    ]
    return b''.join(
        bytes([0xFF, 0xE0 + int(name[3:])]) + (len(content) + 2).to_bytes(2, 'big') + content for name, content in kept
    )


def to_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns an image as people see it: RGB, (H, W, 3), uint8.

    Values of 8 bits stay. Others, whose range is not known, are drawn from 0 (or the least value, if that is negative)
    to the greatest value of the image.

    Args:
        image: (H, W) or (H, W, C), of any real dtype; three channels or four are BGR and BGRA, of other numbers but
            one the first three are drawn, and of two the first.
    """
    image = np.atleast_3d(image)
    image = image[..., :1] if image.shape[2] < 3 else image[..., 2::-1]
    if image.dtype != np.uint8:
        values = np.nan_to_num(image.astype(np.float64), posinf=0, neginf=0)
        if values.min() < 0 or values.max() > 255 or (values != values.round()).any():
            low = min(values.min(), 0)
            values = (values - low) * (255 / max(values.max() - low, np.finfo(np.float64).tiny))
        image = values.round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))

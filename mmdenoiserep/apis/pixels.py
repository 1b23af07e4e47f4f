"""Reads and writes the stored pixels of image files, and converts pixels to RGB for display."""

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
"""Channels of the Pillow modes whose pixels OpenCV reads and writes unchanged."""
ODD_MODES = {
    'P': 'with a palette, as masks are',
    '1': 'with one bit a pixel',
    'CMYK': 'in CMYK',
    'LA': 'in grey with alpha',
}
ENCODERS = {'JPEG': '.jpg', 'MPO': '.jpg', 'PNG': '.png', 'BMP': '.bmp', 'PPM': '.pnm', 'TIFF': '.tif', 'WEBP': '.webp'}
"""The suffix that selects OpenCV's encoder, by Pillow's name of the format; ``.pnm`` writes grey images too."""
BEST_JPEG = (
    cv2.IMWRITE_JPEG_QUALITY,
    100,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)
OPENCV_LIMIT = 2**30
"""Number of pixels of the largest image that OpenCV reads."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""


@dataclass
class StoredImage:
    """An image file in memory.

    Attributes:
        pixels: (H, W) or (H, W, C), uint8 or uint16, BGR or BGRA, not rotated by the EXIF orientation.
        encoder: Suffix that selects OpenCV's encoder for the format of the file; the file may have another suffix.
        segments: Raw EXIF and colour profile segments of a JPEG file.
    """

    pixels: NDArray[Any]
    encoder: str
    segments: bytes = b''

    def encode(self, pixels: NDArray[Any]) -> bytes:
        """Returns a file of the same format, JPEG at the best quality.

        Args:
            pixels: The new pixels, of the same shape and dtype.
        """
        data = cv2.imencode(self.encoder, pixels, BEST_JPEG if self.encoder == '.jpg' else ())[1].tobytes()
        return data[:2] + self.segments + data[2:]


def read_stored(path: Path) -> StoredImage:
    """Reads an image file that can be written again without loss, up to JPEG's own.

    Raises:
        InputError: The file can't be read, or writing would lose something: a palette, CMYK, floats, several pages, an
            EXIF orientation outside of JPEG, a maximum value of PGM or PPM other than 255 or 65535.
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
    """Returns the stored pixels of a file, see :class:`StoredImage`.

    Args:
        path: Path for messages; OpenCV crashes on a path that is not UTF-8.
        data: Content of the file.
        header: Result of :func:`open_header`.

    Raises:
        InputError: The file is empty, broken, not an image or too large.
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
    """Returns the maximum value in the header of a PGM or PPM file: the fourth word, comments skipped."""
    return int(re.match(rb'(?:(?:\s|#[^\n]*\n)*(\S+)){4}', data)[1])  # type: ignore[index]


def open_header(data: bytes) -> Any:
    """Returns the image opened by Pillow without reading its pixels; None if Pillow can't open it."""
    with any_size(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return Image.open(BytesIO(data))
        except Exception:  # Pillow fails on broken files in many ways
            return None


@contextmanager
def any_size() -> Iterator[None]:
    """Lifts Pillow's limit of the image size; reading only the header is safe."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def jpeg_segments(header: Any) -> bytes:
    """Returns the raw EXIF and colour profile segments of a JPEG file."""
    kept = [
        (name, content)
        for name, content in header.applist
        if (name, content[:4]) in (('APP1', b'Exif'), ('APP2', b'ICC_'))
    ]
    return b''.join(
        bytes([0xFF, 0xE0 + int(name[3:])]) + (len(content) + 2).to_bytes(2, 'big') + content for name, content in kept
    )


def to_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns an image for display: RGB, (H, W, 3), uint8.

    8-bit values are kept. Other values are scaled so that 0 (or a negative minimum) is black and the maximum is 255.

    Args:
        image: (H, W) or (H, W, C), any real dtype. Three and four channels are BGR and BGRA; of two the first is shown,
            of more than four the first three.
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

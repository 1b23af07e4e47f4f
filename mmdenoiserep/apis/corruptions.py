"""Corrupts images: noise, blur and the like, drawn from a seed and the number of the image."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..core import InputError
from ..core.files.atomic import check_folder, write_folder
from .folders import find_images
from .pixels import read_stored

COLOURS = (1, 3)
"""Numbers of channels that JPEG has."""
SEVERITIES = dict(noise=40 / 255, blur=2.0, jpeg=10, contrast=0.5, occlusion=0.4, shot=0.05)
"""Corruption: the severity that is taken unless something else is asked for."""
RANGES = dict(noise=(0, 1), blur=(1e-3, 1e3), jpeg=(1, 100), contrast=(0, 1e6), occlusion=(0, 1), shot=(1e-6, 1))
"""Corruption: least and greatest severity. A blur by 0 would be black, one by more than 1000 pixels would not end."""


def corrupt(image: NDArray[Any], corruption: str, severity: float, seed: int, number: int) -> NDArray[Any]:
    """Returns a corrupted image; what is drawn depends on the seed and on the number of the image, and on no other.

    Values of 16 bits count as shares of 65,535, those of 8 bits as shares of 255. Floats and longer integers are taken
    if they are whole and from 0 to 255, as loaders with ``to_float32`` give them.

    Args:
        image: (H, W) or (H, W, C); three channels are BGR, as the libraries load them. The last one of two or of four
            is alpha, which stays as it is.
        corruption: ``clean``; Gaussian ``noise`` or ``blur``, the severity its standard deviation (noise: of 1, blur:
            in pixels); ``jpeg``, its quality; ``contrast``, the factor of all values; ``occlusion`` by one black
            rectangle, its side as a share of the image's; ``shot`` noise, its scale.
        severity: As above.
        seed: Of all images, 0 or more.
        number: Of this image, 0 or more.

    Returns:
        The corrupted image, of the same shape and dtype.

    Raises:
        InputError: The range of the values is not known, or the corruption does not take the image or the severity.
    """
    if corruption == 'clean':
        return image
    channels = image.shape[2] if image.ndim == 3 else 1
    colours = channels - 1 if channels in (2, 4) else channels
    if corruption == 'jpeg' and (image.dtype == np.uint16 or colours not in COLOURS):
        raise InputError(f'jpeg takes 8-bit images of 1 or 3 channels, not {channels} of {image.dtype}')
    if image.dtype == np.uint16:
        most = np.float32(65535)
    elif image.dtype == np.uint8 or holds_bytes(image):
        most = np.float32(255)
    else:
        raise InputError(
            f'{corruption} needs values of 8 or 16 bits, not {image.dtype} from {image.min():g} to {image.max():g}, of '
            'which the range is not known'
        )
    corrupted = np.atleast_3d(image).copy()
    # more words than the sum of both: the draws of (0, 1) are not those of (1, 0)
    drawn = int.from_bytes(np.random.SeedSequence([seed, number]).generate_state(4).tobytes(), 'little')
    rgb = np.ascontiguousarray(corrupted[..., :colours][..., ::-1] / most, np.float32)  # (H, W, colours), 0 to 1
    rgb = make_transform(corruption, severity, drawn)(image=rgb)['image'].reshape(rgb.shape)
    corrupted[..., :colours] = (rgb[..., ::-1] * most).round().clip(0, most)
    return corrupted.reshape(image.shape)


def holds_bytes(image: NDArray[Any]) -> bool:
    """Returns whether all values are whole and from 0 to 255, though their type has more of them."""
    if image.dtype == np.bool_ or not np.isfinite(image).all():
        return False
    return np.array_equal(image, image.clip(0, 255).astype(np.uint8))


def make_transform(corruption: str, severity: float, seed: int) -> Any:
    """Returns the transform of albumentations, which takes RGB images (H, W, C) and draws in their order.

    Args:
        corruption: As for :func:`corrupt`, but not ``clean``.
        severity: As for :func:`corrupt`.
        seed: Of all that the transform draws.

    Raises:
        InputError: The corruption does not take the severity.
    """
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # it asks the network for news otherwise
    import albumentations as A

    least, most = RANGES[corruption]
    if not least <= severity <= most or (corruption == 'jpeg' and severity % 1):
        whole = 'a whole number from ' if corruption == 'jpeg' else ''
        raise InputError(f'severity {severity:g} does not work for {corruption}: take {whole}{least:g} to {most:g}')
    both = (severity, severity)
    transforms: dict[str, tuple[Any, dict[str, Any]]] = {
        'noise': (A.GaussNoise, dict(std_range=both)),
        'blur': (A.GaussianBlur, dict(sigma_limit=both, blur_limit=0)),
        'jpeg': (A.ImageCompression, dict(quality_range=both)),
        'contrast': (A.RandomBrightnessContrast, dict(brightness_limit=(0, 0), contrast_limit=(severity - 1,) * 2)),
        'occlusion': (
            A.CoarseDropout,
            dict(num_holes_range=(1, 1), hole_height_range=both, hole_width_range=both, fill=0),
        ),
        'shot': (A.ShotNoise, dict(scale_range=both)),
    }
    kind, options = transforms[corruption]
    return A.Compose([kind(**options, p=1.0)], seed=seed)


def corrupt_folder(
    images: str | Path,
    target: str | Path,
    corruption: str,
    severity: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Copies a folder of images with one corruption, all or nothing.

    Image i of the sorted paths depends on the seed and on i alone. Names, formats, channels, bits, alpha and the EXIF
    of a JPEG file stay; a JPEG file is written at its best quality.

    Args:
        images: Folder of images; folders in it are searched too.
        target: Folder to write, with the same folders in it.
        corruption: See :func:`corrupt`.
        severity: See :func:`corrupt`; None takes that of :data:`SEVERITIES`.
        seed: Of all images, 0 or more.
        overwrite: Whether to replace an older copy.

    Returns:
        Number of images.

    Raises:
        InputError: A folder or an image can't be used, or the corruption does not take it.
    """
    images, target = Path(images), Path(target)
    if target.resolve() in (images.resolve(), *images.resolve().parents):
        raise InputError(f'{target} holds the images themselves; name another folder')
    if images.resolve() in target.resolve().parents:
        raise InputError(
            f'{target} lies among the images, so the next run would take it for some; name a folder beside them'
        )
    paths = find_images(images)
    copies = {target / path.relative_to(images) for path in paths}
    check_folder(target, lambda path: copies.issuperset(_files_in(path)), overwrite)
    severity = SEVERITIES[corruption] if severity is None else severity
    make_transform(corruption, severity, seed)
    with write_folder(target) as new:
        for i, path in enumerate(tqdm(paths, unit='image')):
            stored = read_stored(path)
            try:
                pixels = corrupt(stored.pixels, corruption, severity, seed, i)
            except InputError as error:
                raise InputError(f'{path}: {error}') from None
            copy = new / path.relative_to(images)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(stored.encode(pixels))
    return len(paths)


def _files_in(path: Path) -> list[Path]:
    return [file for file in path.rglob('*') if not file.is_dir()] if path.is_dir() else [path]

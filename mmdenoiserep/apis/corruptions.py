"""Corrupts images with noise, blur, JPEG artefacts and more, by albumentations."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..core import InputError
from ..core.files.atomic import check_folder, write_folder
from .arguments import at_least, one_of
from .folders import check_outside, find_images
from .pixels import read_stored

COLOURS = dict(jpeg=(1, 3), colour=(3,))
"""Numbers of channels that a corruption supports; the others support all."""
SEVERITIES = dict(
    noise=40 / 255,
    blur=2.0,
    jpeg=10,
    contrast=0.5,
    occlusion=0.4,
    shot=0.05,
    colour=0.5,
    haze=0.3,
    mixture=1.0,
    varying=80 / 255,
)
"""Default severity of each corruption."""
RANGES = dict(
    noise=(0, 1),
    blur=(1e-3, 1e3),
    jpeg=(1, 100),
    contrast=(0, 1e6),
    occlusion=(0, 1),
    shot=(1e-6, 1),
    colour=(0, 1),
    haze=(0, 1),
    mixture=(1e-3, 6),
    varying=(0, 1),
)
"""Smallest and largest severity of each corruption. A blur of 0 gives black, one above 1000 takes forever."""


def corrupt(image: NDArray[Any], corruption: str, severity: float, seed: int, number: int) -> NDArray[Any]:
    """Returns a corrupted image; its random numbers depend on ``seed`` and ``number`` alone.

    Args:
        image: (H, W) or (H, W, C), uint8 or uint16, which are divided by 255 and 65,535; other dtypes hold whole
            numbers from 0 to 255, as after ``to_float32``. Three channels are BGR. The last of two or four channels is
            alpha, which is not changed.
        corruption: ``'clean'``, ``'noise'`` (Gaussian), ``'blur'`` (Gaussian), ``'jpeg'``, ``'contrast'``,
            ``'occlusion'`` (one black rectangle), ``'shot'`` (Poisson noise), ``'colour'`` (warm cast),
            ``'haze'`` (white), ``'mixture'`` (blur, then noise) or ``'varying'`` (noise that differs by image).
        severity: Noise: standard deviation, for values from 0 to 1. Blur: standard deviation in pixels. JPEG: quality.
            Contrast: factor. Occlusion: side of the rectangle as a share of the image's. Shot: scale. Colour: c,
            for gains of 1 + c of red and 1 - c of blue. Haze: share of white. Mixture: factor of the default severities
            of blur and noise. Varying: largest standard deviation; each image draws one from 0 on.
        seed: Seed of all images, 0 or more.
        number: Number of this image, 0 or more.

    Returns:
        The corrupted image, with the same shape and dtype.

    Raises:
        InputError: The corruption is unknown or does not support the image or the severity, the range of the values is
            unknown, or the seed or the number is negative.
    """
    if corruption == 'clean':
        return image
    at_least(0, seed=seed, number=number)
    channels = image.shape[2] if image.ndim == 3 else 1
    colours = channels - 1 if channels in (2, 4) else channels
    if colours not in COLOURS.get(corruption, (colours,)):
        numbers = ' or '.join(map(str, COLOURS[corruption]))
        raise InputError(f'{corruption} takes images of {numbers} channels, not {channels}')
    if corruption == 'jpeg' and image.dtype == np.uint16:
        raise InputError('jpeg takes 8-bit images, not uint16')
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
    # the sum of both would give (0, 1) and (1, 0) the same random numbers
    drawn = int.from_bytes(np.random.SeedSequence([seed, number]).generate_state(4).tobytes(), 'little')
    rgb = np.ascontiguousarray(corrupted[..., :colours][..., ::-1] / most, np.float32)  # (H, W, colours), 0 to 1
    rgb = make_transform(corruption, severity, drawn)(image=rgb)['image'].reshape(rgb.shape)
    corrupted[..., :colours] = (rgb[..., ::-1] * most).round().clip(0, most)
    return corrupted.reshape(image.shape)


def holds_bytes(image: NDArray[Any]) -> bool:
    """Returns whether all values are whole numbers from 0 to 255, in a dtype of a larger range."""
    if image.dtype == np.bool_ or not np.isfinite(image).all():
        return False
    return np.array_equal(image, image.clip(0, 255).astype(np.uint8))


def make_transform(corruption: str, severity: float, seed: int) -> Any:
    """Returns a transform of albumentations for RGB images, (H, W, C); its draws depend on the order of the images.

    Args:
        corruption: A corruption of :func:`corrupt` except ``'clean'``.
        severity: See :func:`corrupt`.
        seed: Seed of the transform.

    Raises:
        InputError: The corruption is unknown, the severity is outside :data:`RANGES`, or the seed is negative.
    """
    one_of(RANGES, corruption=corruption)
    at_least(0, seed=seed)
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # otherwise it looks for updates in the network
    import albumentations as A

    least, most = RANGES[corruption]
    if not least <= severity <= most or (corruption == 'jpeg' and severity % 1):
        whole = 'a whole number from ' if corruption == 'jpeg' else ''
        raise InputError(f'severity {severity:g} does not work for {corruption}: take {whole}{least:g} to {most:g}')
    both = (severity, severity)
    light = A.RandomBrightnessContrast
    transforms: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        'noise': [(A.GaussNoise, dict(std_range=both))],
        'blur': [(A.GaussianBlur, dict(sigma_limit=both, blur_limit=0))],
        'jpeg': [(A.ImageCompression, dict(quality_range=both))],
        'contrast': [(light, dict(brightness_limit=(0, 0), contrast_limit=(severity - 1,) * 2))],
        'occlusion': [
            (A.CoarseDropout, dict(num_holes_range=(1, 1), hole_height_range=both, hole_width_range=both, fill=0))
        ],
        'shot': [(A.ShotNoise, dict(scale_range=both))],
        'colour': [(A.Lambda, dict(image=partial(_cast, severity)))],
        'haze': [(light, dict(brightness_limit=both, contrast_limit=(-severity, -severity)))],
        'mixture': [
            (A.GaussianBlur, dict(sigma_limit=(severity * SEVERITIES['blur'],) * 2, blur_limit=0)),
            (A.GaussNoise, dict(std_range=(severity * SEVERITIES['noise'],) * 2)),
        ],
        'varying': [(A.GaussNoise, dict(std_range=(0, severity)))],
    }
    return A.Compose([kind(**options, p=1.0) for kind, options in transforms[corruption]], seed=seed)


def _cast(severity: float, image: NDArray[Any], **_: Any) -> NDArray[Any]:
    """Returns an RGB image, (H, W, 3), with a warm cast."""
    cast = image * np.float32([1 + severity, 1, 1 - severity])
    return cast.round().clip(0, 255).astype(np.uint8) if image.dtype == np.uint8 else cast.clip(0, 1)


def corrupt_folder(
    images: str | Path,
    target: str | Path,
    corruption: str,
    severity: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Writes a corrupted copy of a folder of images; an error writes nothing.

    Image i of the sorted paths depends on the seed and on i alone. The copies keep name, format, channels, bit depth,
    alpha and the EXIF of JPEG files, which are written at the best quality.

    Args:
        images: Folder of images; its subfolders are searched too.
        target: Folder to write, with the same subfolders.
        corruption: See :func:`corrupt`.
        severity: See :func:`corrupt`; None takes the default of :data:`SEVERITIES`.
        seed: Seed of all images, 0 or more.
        overwrite: Whether to replace an older copy.

    Returns:
        The number of images.

    Raises:
        InputError: A folder or an image can't be used, or the corruption does not support it.

    Examples:
        >>> corrupt_folder('images', 'noisy', 'noise', severity=0.1)
        4
    """
    images, target = Path(images), Path(target)
    if target.resolve() in (images.resolve(), *images.resolve().parents):
        raise InputError(f'{target} holds the images themselves; name another folder')
    check_outside(target, images)
    paths = find_images(images)
    copies = {target / path.relative_to(images) for path in paths}
    check_folder(target, lambda path: copies.issuperset(_files_in(path)), overwrite)
    severity = SEVERITIES.get(corruption, 0) if severity is None else severity
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

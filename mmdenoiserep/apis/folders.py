"""Finds the image files of a folder."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..core import InputError
from ..core.utils.errors import printable

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
"""Suffixes of image files, in lower or upper case; a config may add others (``img_suffix``)."""


def find_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Returns the sorted paths of all images in a folder and its subfolders; links are followed.

    Hidden files and folders, and files with other suffixes, are left out; one line on stderr counts them.

    Args:
        folder: The folder.
        suffixes: Suffixes of image files, in lower case.

    Raises:
        InputError: The folder does not exist, can't be listed or has no images, or an image is not a file.
    """
    if not os.path.isdir(folder):
        raise InputError(f'{folder} is not a folder')
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    for entry in _walk(str(folder), ()):
        if _is_hidden(entry.name):
            left_out['hidden'] += 1
        elif not entry.name.lower().endswith(suffixes):
            left_out[Path(entry.name).suffix.lower() or 'without a suffix'] += 1
        elif not entry.is_file():  # reading a pipe would block
            link = f' but a link to {os.readlink(entry.path)}' if entry.is_symlink() else ''
            raise InputError(f'{entry.path} is not a file{link}; remove it, or rename it')
        else:
            paths.append(Path(entry.path))
    others = ', '.join(f'{count:,} {kind}' for kind, count in left_out.most_common())
    if not paths:
        raise InputError(f'{folder} has no images ({", ".join(suffixes)})' + (f'; it has {others}' if others else ''))
    if others and not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    ):
        print(printable(f'{folder}: {len(paths):,} images; left out: {others}'), file=sys.stderr)
    return sorted(paths)


def check_outside(target: Path, folder: Path) -> None:
    """Refuses to write into a folder of images, where the next run would read the file as an image.

    Raises:
        InputError: The target lies in the folder, or in one of its subfolders.
    """
    if folder.resolve() in target.resolve().parents:
        raise InputError(
            f'{target} lies among the images, so the next run would read it too; name a path outside of {folder}'
        )


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[os.DirEntry]:
    """Yields the entries of a folder and its visible subfolders; a link to a folder above itself is not followed."""
    try:
        about = os.stat(folder)
        here = about.st_dev, about.st_ino
        for entry in os.scandir(folder) if here not in above else ():
            if entry.is_dir() and not _is_hidden(entry.name):
                yield from _walk(entry.path, (*above, here))
            else:
                yield entry
    except OSError as error:
        raise InputError(f'{folder} cannot be listed: {error.strerror}') from None


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name == '@eaDir'  # thumbnails of Synology drives

"""Files of images in a folder."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..core import InputError
from ..core.utils.errors import printable

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
"""Names of images in a folder, in small or capital letters; a config may name others (``img_suffix``)."""


def find_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Returns the paths of all images in a folder and the folders in it, also behind links, sorted.

    Hidden files and folders, and files of other suffixes, are left out; one line on stderr counts them.

    Args:
        folder: The folder.
        suffixes: Ends of the names of images, in lower case.

    Raises:
        InputError: It is no folder, can't be listed, has no images, or one of them is no file.
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
        elif not entry.is_file():  # a pipe would be waited for
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


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[os.DirEntry]:
    """Yields all but folders that are not hidden; a link to a folder above itself is not followed."""
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
    return name.startswith('.') or name == '@eaDir'  # thumbnails of network drives

"""Writes files and folders all or nothing, over nothing that nobody asked to replace."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from launch import stop


def check_output(target: Path, suffix: str, overwrite: bool) -> None:
    """Ends the program if a file must not or can't be written, before anything is computed."""
    if target.suffix != suffix:
        stop(f'{target} must end with {suffix}')
    try:
        if target.exists() and not overwrite:
            stop(f'{target} exists; name another file, or pass --overwrite')
        if target.is_dir():
            stop(f'{target} is a folder; name a file')
        if not target.parent.is_dir():
            stop(f'the folder {target.parent} does not exist; create it first')
    except OSError as error:  # a name that is too long, a folder that is closed
        stop(f'{target} cannot be written: {error.strerror}')


def check_folder(target: Path, is_ours: Callable[[Path], bool], overwrite: bool) -> None:
    """Ends the program if a folder must not or can't be written, before anything is computed.

    Args:
        target: The folder.
        is_ours: Whether a path in the folder is something that the program writes, and may replace.
        overwrite: Whether it may.
    """
    try:
        if target.exists() and not target.is_dir():
            stop(f'{target} is not a folder')
        found = list(target.iterdir()) if target.exists() else []
    except OSError as error:  # a name that is too long, a folder that is closed
        stop(f'{target} cannot be written: {error.strerror}')
    if found and not overwrite:
        stop(f'{target} exists and is not empty; name another folder, or pass --overwrite')
    if others := [path.name for path in found if not is_ours(path)]:
        stop(f'{target} holds {min(others)}, which --overwrite would delete; name another folder')


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """Gives a file that becomes the target at the end, or is removed; a full disk ends the program with a sentence."""
    from mmdenoiserep.core.files.atomic import whole_file

    try:
        with whole_file(target) as file:
            yield file
    except OSError as error:
        stop(f'{target} cannot be written: {error.strerror or error}')


@contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside the target, which replaces the target at the end, or is removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a part of the name, for it may be as long as a name can be
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name[:32]}.') as scratch:
            new, old = Path(scratch, 'new'), Path(scratch, 'old')
            new.mkdir()
            yield new
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
    except OSError as error:
        stop(f'{target} cannot be written: {error.strerror or error}')

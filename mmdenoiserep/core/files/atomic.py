"""Writes a file or a folder atomically; refuses to replace what nobody asked to replace."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..utils.errors import CheckpointError


def check_output(target: Path, overwrite: bool, *, suffix: str = '', source: Path | None = None) -> None:
    """Refuses a file that must not or can't be written, before anything is computed.

    Args:
        target: File to write.
        overwrite: Whether it may exist.
        suffix: What its name has to end with.
        source: A file that is read, and must stay.

    Raises:
        CheckpointError: The target is a folder, the source, there already, in no folder, or has another suffix.
    """
    if target.suffix != suffix and suffix:
        raise CheckpointError(f'{target} must end with {suffix}')
    try:
        if target.is_dir():
            raise CheckpointError(f'{target} is a folder; name the file to write, such as {target / "out"}{suffix}')
        if target.exists():
            if source and source.exists() and target.samefile(source):
                raise CheckpointError(f'{target} is the input itself; name another file to write')
            if not overwrite:
                raise CheckpointError(f'{target} exists; name another file, or pass --overwrite')
        if not target.parent.is_dir():
            raise CheckpointError(f'the folder {target.parent} does not exist; create it first')
    except OSError as error:  # a name that is too long, a folder that is closed
        raise CheckpointError(f'{target} cannot be written: {error.strerror}') from None


def check_folder(target: Path, is_ours: Callable[[Path], bool], overwrite: bool) -> None:
    """Refuses a folder that must not or can't be written, before anything is computed.

    Args:
        target: Folder to write.
        is_ours: Whether a path in the folder is something that the program writes, and may replace.
        overwrite: Whether it may.

    Raises:
        CheckpointError: The target is no folder, can't be read, or holds what may not be replaced.
    """
    try:
        if target.exists() and not target.is_dir():
            raise CheckpointError(f'{target} is not a folder')
        found = list(target.iterdir()) if target.exists() else []
    except OSError as error:  # a name that is too long, a folder that is closed
        raise CheckpointError(f'{target} cannot be written: {error.strerror}') from None
    if found and not overwrite:
        raise CheckpointError(f'{target} exists and is not empty; name another folder, or pass --overwrite')
    if others := [path.name for path in found if not is_ours(path)]:
        raise CheckpointError(f'{target} holds {min(others)}, which --overwrite would delete; name another folder')


@contextmanager
def write_file(target: Path) -> Iterator[BinaryIO]:
    """Gives a file that becomes the target at the end, or is removed on any error; see :func:`whole_file`.

    Raises:
        CheckpointError: The folder or disk does not take the file.
    """
    try:
        with whole_file(target) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f'{target} cannot be written: {error.strerror or error}') from None


@contextmanager
def write_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside the target, which replaces the target at the end, or is removed on any error.

    Raises:
        CheckpointError: The disk does not take the folder.
    """
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
        raise CheckpointError(f'{target} cannot be written: {error.strerror or error}') from None


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Gives a new file in the folder of the target, which takes its name at the end, or is removed on any error.

    Until then it is hidden and ends with ``.part``; no other writer has the same. What a killed process leaves is one
    such file, and the target as it was.

    Args:
        target: File to write, with the permissions of any other new file; an older one, or a link, is replaced.

    Raises:
        OSError: The folder or disk does not take the file.
    """
    # a part of the name, for it may be as long as a name can be, and a character takes up to four bytes
    handle, temporary = tempfile.mkstemp(prefix=f'.{target.name[:32]}.', suffix='.part', dir=target.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

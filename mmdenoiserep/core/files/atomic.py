"""Writes a file or a folder atomically; refuses to replace an existing one unless told to."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..utils.errors import CheckpointError


def check_output(target: Path, overwrite: bool, *, suffix: str = '', source: Path | None = None) -> None:
    """Checks before any computation that a file can be written.

    Args:
        target: File to write.
        overwrite: Whether the file may exist.
        suffix: Suffix that the name must have, such as ``'.pth'``.
        source: An input file, which the target must not be.

    Raises:
        CheckpointError: The target is a folder, is the source, exists, is in a folder that does not exist, or has
            another suffix.
    """
    if target.suffix != suffix and suffix:
        raise CheckpointError(f'{target} must end with {suffix}')
    with _os_errors_as_input_errors(target):  # a name that is too long, a folder without permission
        if target.is_dir():
            raise CheckpointError(f'{target} is a folder; name the file to write, such as {target / "out"}{suffix}')
        if target.exists():
            if source and source.exists() and target.samefile(source):
                raise CheckpointError(f'{target} is the input itself; name another file to write')
            if not overwrite:
                raise CheckpointError(f'{target} exists; name another file, or pass --overwrite')
        if not target.parent.is_dir():
            raise CheckpointError(f'the folder {target.parent} does not exist; create it first')


def check_folder(target: Path, is_ours: Callable[[Path], bool], overwrite: bool) -> None:
    """Checks before any computation that a folder can be written.

    Args:
        target: Folder to write.
        is_ours: Whether a path in the folder is an output of the program, which it may replace.
        overwrite: Whether the folder may hold such outputs.

    Raises:
        CheckpointError: The target is no folder, can't be read, or holds a path that must not be replaced.
    """
    with _os_errors_as_input_errors(target):
        if target.exists() and not target.is_dir():
            raise CheckpointError(f'{target} is not a folder')
        found = list(target.iterdir()) if target.exists() else []
    if found and not overwrite:
        raise CheckpointError(f'{target} exists and is not empty; name another folder, or pass --overwrite')
    if others := [path.name for path in found if not is_ours(path)]:
        raise CheckpointError(f'{target} holds {min(others)}, which --overwrite would delete; name another folder')


@contextmanager
def write_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing, as :func:`atomic_file` does.

    Raises:
        CheckpointError: The file can't be written.
    """
    with _os_errors_as_input_errors(target), atomic_file(target) as file:
        yield file


@contextmanager
def write_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside the target, which replaces the target at the end; on an error it is removed.

    Raises:
        CheckpointError: The folder can't be written.
    """
    with _os_errors_as_input_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # the prefix is cut, because the whole name may have the maximal length already
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


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, which is renamed to the target at the end; on an error it is removed.

    The temporary file is hidden, lies in the folder of the target, ends with ``.part`` and belongs to one writer. A
    killed process leaves it behind, and the target unchanged.

    Args:
        target: File to write, with the default permissions; an existing file or link is replaced.

    Raises:
        OSError: The file can't be written.
    """
    # the prefix is cut, because the whole name may have the maximal length already; a character takes up to 4 bytes
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


@contextmanager
def _os_errors_as_input_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f'{target} cannot be written: {error.strerror or error}') from None

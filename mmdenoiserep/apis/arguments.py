"""Checks the arguments of the functions that users call; each mistake is an InputError that names the argument."""

import os
import tempfile
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

from ..core import InputError


def at_least(least: int, /, optional: bool = False, **arguments: Any) -> None:
    """Checks that arguments are whole numbers of ``least`` or more, or None if they are optional."""
    for name, value in arguments.items():
        if optional and value is None:
            continue
        if not isinstance(value, Integral) or value < least:
            raise InputError(f'{name} must be a whole number of {least} or more, got {value!r}')


def one_of(choices: Iterable[str | None], /, **arguments: Any) -> None:
    """Checks that arguments are among the choices."""
    choices = tuple(choices)
    for name, value in arguments.items():
        if value not in choices:
            raise InputError(f'{name} must be one of {", ".join(map(str, choices))}, got {value!r}')


def checkpoint_path(checkpoint: str | Path) -> str:
    """Returns the path or URL of a checkpoint as the string that mmengine needs; checks that the file exists."""
    path = str(checkpoint)
    if '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        raise InputError(f'the checkpoint {path} does not exist')
    return path


def make_folder(folder: str | Path) -> None:
    """Makes a folder with its parents; checks that files can be written into it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f'the folder {folder} cannot be written to: {error.strerror}') from None

"""Errors of the tools: one sentence for bad input, the traceback for the user's own code."""

import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry

from ..core import InputError

LIBRARIES = ('mmdenoiserep', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch')
PACKAGE = Path(__file__).parents[1]
TOOLS = PACKAGE.parent / 'tools'
WORKER = 'Original Traceback (most recent call last)'
"""In the text of an error that a reading process of a DataLoader has passed on."""


class ConfigError(InputError):
    """A config that can't be read, lacks a key, or names something that can't be built."""


def config_name(cfg: Config) -> str:
    """Returns ``'the config PATH'``; ``'the config'`` if it comes from no file."""
    return f'the config {cfg.filename}' if cfg.filename else 'the config'


def config_path(cfg: Config) -> str:
    """Returns the path of a config for messages, ``'in memory'`` without one; checks that it is a config."""
    if not isinstance(cfg, Config):
        raise InputError(f'cfg must be a Config, such as load_config returns, got a {type(cfg).__name__}')
    return cfg.filename or 'in memory'


@contextmanager
def config_at_fault(path: str | Path) -> Iterator[None]:
    """Turns errors of the libraries into a :class:`ConfigError` that names the config.

    Args:
        path: Path of the config.

    Raises:
        ConfigError: A library failed. An InputError, a missing module and errors of the user's code pass unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a class that the config names may fail in any way
        if find_missing(error) or is_from_user(error):
            raise
        raise ConfigError(blame(path, error)) from error


def blame(path: str | Path, error: Exception) -> str:
    """Returns a sentence that names a config, the error that it caused, and where that was raised."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError adds quotes
    text = str(reason).strip()
    if WORKER in text:  # the last line of the traceback in it is the error
        text = text.splitlines()[-1]
    *_, place = _places(error)
    return (
        f'the config {path} does not work ({type(error).__name__}: {text}; raised in {place.path}, line {place.line})'
    )


def find_missing(error: BaseException | None) -> str:
    """Returns the name of the missing module that caused an error; empty if there is none."""
    cause = _missing_import(error)
    return (cause.name or '').partition('.')[0] if cause else ''


def importing_place(error: BaseException | None) -> str:
    """Returns ``FILE, line N,`` of the import of :func:`find_missing`'s module; empty if a config imports it."""
    cause = _missing_import(error)
    places = [place for place in _frames(cause) if place.path.is_file()] if cause else []  # importlib has no files
    return f'{places[-1].path}, line {places[-1].line},' if places and _is_users(places[-1]) else ''


def _missing_import(error: BaseException | None) -> ModuleNotFoundError | None:
    while error:
        if isinstance(error, ModuleNotFoundError):
            name = (error.name or '').partition('.')[0]
            if name and not find_spec(name):
                return error
        error = error.__cause__ or error.__context__
    return None


def is_from_user(error: BaseException | None) -> bool:
    """Returns whether the user's own code is in the traceback of an error or of its causes.

    That is a file outside the standard library, installed packages and this project, and no config; or a file of a
    package that registers classes and is none of :data:`LIBRARIES`.
    """
    return any(map(_is_users, _places(error)))


class _Place(NamedTuple):
    """A frame of a traceback.

    Attributes:
        module: Name of the module; empty if it is not known.
        path: Path of the file.
        line: Number of the line.
        is_config: Whether the file is a config.
    """

    module: str
    path: Path
    line: int
    is_config: bool = False


def _places(error: BaseException | None) -> Iterator[_Place]:
    """Yields the frames of an error, then those of its causes; those of a reading process are in its text."""
    while error:
        yield from _frames(error)
        if WORKER in (text := str(error)):
            for path, line in re.findall(r'File "(.+?)", line (\d+)', text):
                yield _Place('', Path(path), int(line))
        error = error.__cause__ or error.__context__


def _frames(error: BaseException) -> Iterator[_Place]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get('__name__', '')
        # mmengine executes configs without a spec
        is_config = not frame.f_globals.get('__spec__') and name != '__main__'
        yield _Place(name, Path(frame.f_code.co_filename), line, is_config)


def _is_users(place: _Place) -> bool:
    package = place.module.partition('.')[0]
    if place.is_config or package in LIBRARIES or not place.path.is_file():
        return False
    path = place.path.resolve()
    if package and package in _registering_packages():
        return True
    kinds = ('stdlib', 'platstdlib', 'purelib', 'platlib', 'scripts')
    installed = [Path(folder).resolve() for folder in {*map(sysconfig.get_path, kinds), TOOLS, PACKAGE}]
    return not any(map(path.is_relative_to, installed))


def _registering_packages() -> set[str]:
    """Returns the packages of all classes in mmengine's registries, other than :data:`LIBRARIES`."""
    packages, waiting = set(), [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]
    while waiting:
        registry = waiting.pop()
        waiting += registry.children.values()
        packages |= {str(value.__module__).partition('.')[0] for value in registry.module_dict.values()}
    return packages.difference(LIBRARIES, sys.stdlib_module_names)

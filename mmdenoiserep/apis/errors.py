"""Errors of the tools: one sentence for bad input, the traceback for the user's own code."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from ..core import InputError

LIBRARIES = ('mmdenoiserep', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch')
TOOLS = Path(__file__).parents[2] / 'tools'


class ConfigError(InputError):
    """A config that can't be read, lacks a key, or names something that can't be built."""


def config_name(cfg: Config) -> str:
    """Returns ``'the config PATH'``; ``'the config'`` if it comes from no file."""
    return f'the config {cfg.filename}' if cfg.filename else 'the config'


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
    """Returns a sentence that names a config and the error that it caused."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError adds quotes
    return f'the config {path} does not work ({type(error).__name__}: {reason})'


def find_missing(error: BaseException | None) -> str:
    """Returns the name of the missing module that caused an error; empty if there is none."""
    while error:
        name = (getattr(error, 'name', None) or '').partition('.')[0]
        if isinstance(error, ModuleNotFoundError) and name and not find_spec(name):
            return name
        error = error.__cause__ or error.__context__
    return ''


def is_from_user(error: BaseException | None) -> bool:
    """Returns whether the user's own code is in the traceback of an error or of its causes.

    That is a file outside the standard library, installed packages and this project, and no config.
    """
    kinds = ('stdlib', 'platstdlib', 'purelib', 'platlib', 'scripts')
    installed = [Path(path).resolve() for path in {*map(sysconfig.get_path, kinds), TOOLS}]
    while error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            name, path = frame.f_globals.get('__name__', ''), Path(frame.f_code.co_filename)
            is_config = (
                not frame.f_globals.get('__spec__') and name != '__main__'
            )  # mmengine executes configs without a spec
            if is_config or name.partition('.')[0] in LIBRARIES or not path.is_file():
                continue
            if not any(map(path.resolve().is_relative_to, installed)):
                return True
        error = error.__cause__ or error.__context__
    return False

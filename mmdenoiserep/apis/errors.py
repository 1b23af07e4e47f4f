"""What goes wrong while the tools work: a sentence for what a user can mend, the traceback for their own code."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..core import InputError

LIBRARIES = ('mmdenoiserep', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch')
TOOLS = Path(__file__).parents[2] / 'tools'


class ConfigError(InputError):
    """A config that can't be read, lacks a key, or names what can't be built."""


@contextmanager
def config_at_fault(path: str | Path) -> Iterator[None]:
    """Blames a config for what goes wrong while it is turned into objects.

    Args:
        path: Path of the config.

    Raises:
        ConfigError: Anything else that goes wrong in the libraries. InputError, a missing module and what code of the
            user raises go through as they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a config names may fail in any way
        if find_missing(error) or is_from_user(error):
            raise
        raise ConfigError(blame(path, error)) from error


def blame(path: str | Path, error: Exception) -> str:
    """Returns a sentence that blames a config for an error."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error  # a KeyError quotes its message
    return f'the config {path} does not work ({type(error).__name__}: {reason})'


def find_missing(error: BaseException | None) -> str:
    """Returns the module whose absence an error comes from; empty if it comes from something else."""
    while error:
        name = (getattr(error, 'name', None) or '').partition('.')[0]
        if isinstance(error, ModuleNotFoundError) and name and not find_spec(name):
            return name
        error = error.__cause__ or error.__context__
    return ''


def is_from_user(error: BaseException | None) -> bool:
    """Returns whether code of the user raised an error, or called what raised it: a module, model or step of their own.

    That is a file that is no config, and belongs neither to Python's own library nor to an installed package nor to
    this project.

    Args:
        error: What was caught; what it came from counts, too.
    """
    kinds = ('stdlib', 'platstdlib', 'purelib', 'platlib', 'scripts')
    installed = [Path(path).resolve() for path in {*map(sysconfig.get_path, kinds), TOOLS}]
    while error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            name, path = frame.f_globals.get('__name__', ''), Path(frame.f_code.co_filename)
            is_config = not frame.f_globals.get('__spec__') and name != '__main__'  # it is executed without a spec
            if is_config or name.partition('.')[0] in LIBRARIES or not path.is_file():
                continue
            if not any(map(path.resolve().is_relative_to, installed)):
                return True
        error = error.__cause__ or error.__context__
    return False

"""Runs a tool; what keeps it from its work ends it with one sentence behind its name."""

import io
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

PACKAGES = {
    'mmseg': 'mmsegmentation',
    'cv2': 'opencv-python',
    'sklearn': 'scikit-learn',
    'pkg_resources': '"setuptools<81"',
}
"""What brings a module, where it has another name."""


def launch(main: Callable[[], None]) -> None:
    """Runs ``main``; a missing module, a file that is refused and an interrupt end the program with a sentence.

    A name that is no UTF-8 is printed with escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
    except KeyboardInterrupt:
        stop('interrupted')
    except ModuleNotFoundError as error:
        if not (sentence := describe_missing(error)):
            raise
        stop(f'this tool needs {sentence}')
    except Exception as error:
        core = sys.modules.get('mmdenoiserep.core')
        if not core or not isinstance(error, core.InputError):
            raise
        stop(str(error))


def stop(sentence: str) -> NoReturn:
    """Ends the program with a sentence on one line behind the name of the running tool."""
    one_line = re.sub(r'\s*[\r\n]\s*', ' ', f'{Path(sys.argv[0]).stem}: {sentence.strip()}')
    if not one_line.isprintable():
        from mmdenoiserep.core.utils.errors import printable

        one_line = printable(one_line)
    sys.exit(one_line)


def describe_missing(error: BaseException | None) -> str | None:
    """Returns the module whose absence an error comes from, and what to do; None if it comes from something else."""
    while error:
        name = (getattr(error, 'name', None) or '').partition('.')[0]
        if isinstance(error, ModuleNotFoundError) and name and not find_spec(name):
            package = PACKAGES.get(name, name)
            return f'{name}, which is not installed; make install brings the tested versions, or: pip install {package}'
        error = error.__cause__ or error.__context__
    return None

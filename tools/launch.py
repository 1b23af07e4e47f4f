"""Runs a tool; where a module that it needs is missing, one sentence says what to install."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {'mmseg': 'mmsegmentation', 'cv2': 'opencv-python', 'pkg_resources': '"setuptools<81"'}
"""What brings a module, where it has another name."""


def launch(main: Callable[[], None]) -> None:
    """Runs ``main``."""
    try:
        main()
    except ModuleNotFoundError as error:
        if not (sentence := describe_missing(error)):
            raise
        sys.exit(f'{Path(sys.argv[0]).stem}: this tool needs {sentence}')


def describe_missing(error: BaseException | None) -> str | None:
    """Returns the module whose absence an error comes from, and what to do; None if it comes from something else."""
    while error:
        name = (getattr(error, 'name', None) or '').partition('.')[0]
        if isinstance(error, ModuleNotFoundError) and name and not find_spec(name):
            package = PACKAGES.get(name, name)
            return f'{name}, which is not installed; make install brings the tested versions, or: pip install {package}'
        error = error.__cause__ or error.__context__
    return None

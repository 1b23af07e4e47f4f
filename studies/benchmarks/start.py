"""Time of every tool to print its help."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import DEVNULL
from subprocess import run as run_process
from typing import Any

TOOLS = Path(__file__).absolute().parents[2] / 'tools'
GOAL = 1.5
"""Seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and the seconds of all runs by tool under ``seconds``."""
    from studies.benchmarks.measure import alternate

    helps: dict[str, Callable] = {path.name: partial(print_help, path) for path in find_tools()}
    seconds = alternate(helps, 1, args.repeats)
    lines = ['| tool | seconds to its help | goal |', '|---|---|---|']
    for name, values in sorted(seconds.items(), key=lambda item: -median(item[1])):
        verdict = 'met' if median(values) < GOAL else 'missed'
        lines.append(f'| {name} | {median(values):.2f} | {verdict} (below {GOAL}) |')
    return '\n'.join([*lines, '', f'Medians of {args.repeats} runs.']), dict(seconds=seconds)


def find_tools() -> list[Path]:
    """Returns the files in ``tools`` that read a command line."""
    return [
        path
        for path in sorted(TOOLS.rglob('*.py'))
        if "__name__ == '__main__'" in (text := path.read_text()) and 'argparse' in text
    ]


def print_help(tool: Path) -> None:
    """Runs a tool with ``--help``.

    Raises:
        CalledProcessError: The tool fails.
    """
    run_process([sys.executable, str(tool), '--help'], stdout=DEVNULL, stderr=DEVNULL, check=True)

"""Measures time and memory of parts of this package against baselines, on this machine.

``all`` runs every benchmark with its default settings. OMP_NUM_THREADS sets the number of threads. Prints Markdown.
"""

import argparse
import json
import os
import platform
import re
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from denoiserep_commands import launch
from studies import benchmarks

NAMES = [module.name for module in iter_modules(benchmarks.__path__) if module.name != 'measure']
PACKAGES = 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain'
"""Modules whose versions are reported."""


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; every subcommand but ``all`` is a module in ``benchmarks``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar='NAME', required=True)
    for name in NAMES:
        module = import_module(f'studies.benchmarks.{name}')
        description = module.__doc__ or ''
        command = commands.add_parser(
            name.replace('_', '-'), description=description, help=description.splitlines()[0].rstrip('.')
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser('all', help='All benchmarks, one after the other; takes an hour').set_defaults(run=run_all)
    for command in commands.choices.values():
        command.add_argument('--json', type=Path, metavar='FILE', help='also write the figures to this file')
        command.add_argument('--markdown', type=Path, metavar='FILE', help='also write the report to this file')
    return parser.parse_args(words)


def run_all(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Runs every benchmark with its default settings; returns their reports, and their figures by name."""
    texts, figures = [], {}
    for name in NAMES:
        print(f'=== {name}', file=sys.stderr, flush=True)
        one = parse_args([name.replace('_', '-')])
        text, figures[name] = one.run(one)
        title = (import_module(f'studies.benchmarks.{name}').__doc__ or '').splitlines()[0].rstrip('.')
        texts.append(f'## {title}\n\n`python -m studies.benchmark {name.replace("_", "-")}`\n\n{text}')
    return '\n\n'.join(texts), figures


def main() -> None:
    """Runs one benchmark, or all."""
    args = parse_args()
    from mmdenoiserep.core.files.atomic import check_output, write_file

    for path, suffix in ((args.json, '.json'), (args.markdown, '.md')):
        if path:
            check_output(path, True, suffix=suffix)
    text, figures = args.run(args)
    facts = machine()
    report = f'{text}\n\n{", ".join(f"{name} {value}" for name, value in facts.items())}'
    print(report)
    for path, content in ((args.json, json.dumps(dict(figures, machine=facts), indent=2)), (args.markdown, report)):
        if path:
            with write_file(path) as file:
                file.write(f'{content}\n'.encode())


def machine() -> dict[str, str | int]:
    """Returns the hardware and software that the figures depend on."""
    import torch

    from studies.commands import versions

    facts: dict[str, str | int] = dict(
        processor=_processor(),
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        Python=platform.python_version(),
    )
    facts |= versions(PACKAGES)
    facts['torch'] = torch.__version__  # with its build, such as +cpu
    return facts | (dict(GPU=torch.cuda.get_device_name()) if torch.cuda.is_available() else {})


def _processor() -> str:
    """Returns the model of the processor on Linux, otherwise the architecture."""
    info = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*:\s*(.*)$', info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.machine()


if __name__ == '__main__':
    launch(main)

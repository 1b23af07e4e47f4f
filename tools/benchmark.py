"""Measures time and memory of a part of this package beside what else there is, on the machine at hand.

OMP_NUM_THREADS sets the number of threads. The figures are printed as Markdown.
"""

import argparse
import json
import os
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from platform import python_version

import benchmarks

NAMES = [module.name for module in iter_modules(benchmarks.__path__) if module.name != 'measure']


def parse_args() -> argparse.Namespace:
    """Reads the command line; every subcommand is a module in ``benchmarks``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar='NAME', required=True)
    for name in NAMES:
        module = import_module(f'benchmarks.{name}')
        description = module.__doc__ or ''
        command = commands.add_parser(
            name.replace('_', '-'), description=description, help=description.splitlines()[0].rstrip('.')
        )
        command.add_argument('--json', type=Path, metavar='FILE', help='write the figures to this file, too')
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args()


def main() -> None:
    """Runs one benchmark."""
    args = parse_args()
    from common import check_output, written_whole

    if args.json:
        check_output(args.json, '.json', overwrite=True)
    text, figures = args.run(args)
    facts = machine()
    print(f'{text}\n\n{", ".join(f"{name} {value}" for name, value in facts.items())}')
    if args.json:
        with written_whole(args.json) as temporary:
            temporary.write_text(json.dumps(dict(figures, machine=facts), indent=2) + '\n')


def machine() -> dict[str, str | int]:
    """Returns what the figures depend on."""
    import torch

    facts: dict[str, str | int] = dict(
        cores=os.cpu_count() or 0, threads=torch.get_num_threads(), torch=torch.__version__, Python=python_version()
    )
    return facts | (dict(GPU=torch.cuda.get_device_name()) if torch.cuda.is_available() else {})


if __name__ == '__main__':
    main()

"""Measures a domain fit on real weights and photographs, and writes the page of the results.

Two pretrained models and 137 photographs come from packages (extra ``real-weights``, and Debian packages that are
downloaded but not installed). No photograph has a label: predictions for a corrupted crop are compared with those of
the untouched model for the clean crop. Finished steps are not repeated.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

from denoiserep_commands import launch
from mmdenoiserep.core.files.atomic import write_file
from studies.commands import run, versions
from studies.robustness import ENVIRONMENT
from studies.study_report import write_page

ROOT = Path(__file__).absolute().parents[2]
MODELS = 'efficientnet-lite0', 'dinov2-small'
COUNTS = (256,)
CORRUPTIONS = 'clean', 'noise', 'shot', 'blur', 'jpeg', 'contrast', 'occlusion'


def main() -> None:
    """Runs the missing measurements, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS, help='default: both')
    parser.add_argument('--counts', nargs='+', type=int, default=COUNTS, help='crops to fit to (default: 256)')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/real-weights'), help='results (default: %(default)s)'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('docs/real-weights.md'), help='page to write (default: %(default)s)'
    )
    parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)  # measures in this process
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT | {'OMP_NUM_THREADS': '1'}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, int], dict] = {}
    for name in args.models:
        for count in args.counts:
            paths = {corruption: args.work_dir / f'{name}_{count}_{corruption}.json' for corruption in CORRUPTIONS}
            missing = {corruption: path for corruption, path in paths.items() if not path.exists()}
            if args.one:
                measure(name, count, missing)
            elif missing:
                place = ['--models', name, '--counts', str(count), '--work-dir', str(args.work_dir)]
                log = args.work_dir / f'{name}_{count}.log'
                run(f'{name}, {count} crops', '-m', 'studies.real_weights', '--one', *place, log=log)
            results[name, count] = {c: json.loads(path.read_text()) for c, path in paths.items()}
    if args.one:
        return
    from studies.real_weights.report import report

    seconds = sum(result['cpu_seconds'] for measured in results.values() for result in measured.values())
    packages = ', '.join(
        f'{name} {number}' for name, number in versions(('torch', 'mmpretrain', 'albumentations')).items()
    )
    note = f'One thread, {seconds / 60:.0f} minutes of CPU time, Python {platform.python_version()}, {packages}.'
    write_page(args.out, report(results, note))
    print(f'Written to {args.out}')


def measure(name: str, count: int, paths: dict[str, Path]) -> None:
    """Measures a model under some corruptions, and writes each result to its path."""
    import torch

    from studies.real_weights.measure import RealWeights
    from studies.real_weights.photographs import gather, split

    torch.set_num_threads(1)
    model = RealWeights(name, split(gather()), count)
    for corruption, path in paths.items():
        started = time.process_time()
        result = model.measure(corruption)
        result['cpu_seconds'] = time.process_time() - started
        with write_file(path) as file:
            file.write(json.dumps(result).encode())
        print(f'{name}, {count} crops, {corruption}: {result["cpu_seconds"]:.0f} s', flush=True)


if __name__ == '__main__':
    launch(main)

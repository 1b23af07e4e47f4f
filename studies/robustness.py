"""Measures what a fit to the deployment domain recovers on corrupted images, and writes what came out.

For each experiment of studies.study and each seed: the same baseline (the two programs share their work dir), fitted
to unlabelled corrupted training images, fused, and evaluated on the test images with other draws of the corruption.
Beside it: the paper's schedule, re-estimated BatchNorm, entropy minimisation, and fine-tuning with labels and noise.
A finished step is not run again.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from studies import study
from studies.commands import last_checkpoint, run
from studies.robustness_report import Result, draw, report
from studies.study_report import write_page

ROOT = Path(__file__).absolute().parents[1]
ENVIRONMENT = {
    'NO_ALBUMENTATIONS_UPDATE': '1',  # it asks the network for news otherwise
    # glibc keeps freed memory; to get and clear it again and again takes a third of a fit's time
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**36),
}
"""For the processes that are started."""
NOTE = 'robustness_note.json'


def run_seed(experiment: study.Experiment, seed: int, folder: Path, overrides: list[str]) -> None:
    """Trains what is missing of one experiment with one seed, and measures in a process of its own."""
    from studies.robustness_run import CLASSIFICATION, RESULT, write_noise_config

    study.train(folder, 'baseline', experiment.config(), seed, overrides)
    if experiment.data == CLASSIFICATION:
        more = [*overrides, f'load_from={last_checkpoint(folder / "baseline")}']
        study.train(folder, 'control', experiment.config('_baseline-ft'), seed, more)
        study.train(folder, 'noise-augmented', write_noise_config(experiment, folder), seed, more)
    if not (folder / RESULT).exists():
        place = ['--work-dir', str(folder.parents[1]), *(['--cfg-options', *overrides] if overrides else [])]
        command = ['-m', 'studies.robustness', '--one', folder.parent.name, str(seed), *place]
        run(f'{folder}: robustness', *command, log=folder / 'robustness.log')


def read_results(work_dir: Path) -> list[Result]:
    """Reads every finished measurement below a work dir."""
    from studies.robustness_run import RESULT

    results = []
    for name, experiment in study.EXPERIMENTS.items():
        paths = {int(path.parent.name.split('_')[1]): path for path in work_dir.glob(f'{name}/seed_*/{RESULT}')}
        if paths:
            runs = [json.loads(paths[seed].read_text()) for seed in sorted(paths)]
            metrics = {metric: study.METRICS[key][1] for metric, key in experiment.metrics.items()}
            results.append(Result(name, experiment.title, experiment.data, sorted(paths), metrics, runs))
    return results


def main() -> None:
    """Measures what is missing, and writes the page and the picture."""
    parser = study.make_parser(__doc__, Path('docs/domain.md'))
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)  # NAME SEED, in a process of its own
    args = study.parse_args(parser)
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT
    warnings.simplefilter('ignore')
    if args.one:
        from studies.robustness_run import measure_one

        measure_one(args)
        return
    if not args.report:
        study.run_all(args, run_seed, NOTE, (*study.PACKAGES, 'albumentations'))
    note, results = args.work_dir / NOTE, read_results(args.work_dir)
    if not note.exists() or not results:
        raise InputError(f'{args.work_dir} holds no finished measurement; start it without --report')
    from studies.robustness_run import SEVERITIES

    text = report(results, json.loads(note.read_text()), SEVERITIES)
    write_page(args.out, text)
    draw(results, args.out.with_suffix('.png'))
    print(f'\n{text}\n\nWritten to {args.out}')


if __name__ == '__main__':
    launch(main)

"""Measures how much accuracy a domain fit recovers on corrupted images, and writes the page of the results.

For each experiment of studies.study and each seed, the baseline (the two programs share their work dir) is fitted to
unlabelled corrupted training images and evaluated on test images with other draws of the corruption. It is compared
with the paper's schedule, re-estimated BatchNorm, entropy minimisation, the alignment of blocks at test time, image
filters, and fine-tuning with labels. Finished steps are not repeated.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from mmdenoiserep.core.files.atomic import write_file
from studies import study
from studies.commands import last_checkpoint, run
from studies.robustness_report import Result, draw, report
from studies.study_report import write_page

ROOT = Path(__file__).absolute().parents[1]
ENVIRONMENT = {
    'NO_ALBUMENTATIONS_UPDATE': '1',  # otherwise albumentations looks for updates in the network
    # make glibc keep freed memory but for large blocks: to clear it again takes a third of the time of a fit, and
    # large blocks would leave holes of many GiB
    'MALLOC_MMAP_THRESHOLD_': str(2**25),
    'MALLOC_TRIM_THRESHOLD_': str(2**36),
}
"""Environment variables of the started processes."""
NOTE = 'robustness_note.json'


def run_seed(experiment: study.Experiment, seed: int, folder: Path, overrides: list[str]) -> None:
    """Trains the missing models of one experiment with one seed, and measures in a separate process."""
    from studies.robustness_rivals import write_noise_config
    from studies.robustness_run import CLASSIFICATION, PARTS, path_of

    study.train(folder, 'baseline', experiment.config(), seed, overrides)
    if experiment.data == CLASSIFICATION:
        more = [*overrides, f'load_from={last_checkpoint(folder / "baseline")}']
        study.train(folder, 'control', experiment.config('_baseline-ft'), seed, more)
        study.train(folder, 'noise-augmented', write_noise_config(experiment, folder), seed, more)
    place = ['--work-dir', str(folder.parents[1]), *(['--cfg-options', *overrides] if overrides else [])]
    for part in PARTS:
        if not path_of(folder, part).exists():
            command = ['-m', 'studies.robustness', '--one', folder.parent.name, str(seed), part, *place]
            run(f'{folder}: {part}', *command, log=folder / f'robustness-{part}.log')


def read_results(work_dir: Path) -> list[Result]:
    """Reads every finished measurement below a work dir."""
    from studies.robustness_run import PARTS, path_of, read_run

    results = []
    for name, experiment in study.EXPERIMENTS.items():
        folders = {int(folder.name.split('_')[1]): folder for folder in work_dir.glob(f'{name}/seed_*')}
        paths = {seed: path for seed, path in folders.items() if all(path_of(path, part).exists() for part in PARTS)}
        if paths:
            runs = [read_run(paths[seed]) for seed in sorted(paths)]
            metrics = {metric: study.METRICS[key][1] for metric, key in experiment.metrics.items()}
            results.append(Result(name, experiment.title, experiment.data, sorted(paths), metrics, runs))
    return results


def measure_one(args: argparse.Namespace) -> None:
    """Measures one part for the trained models of one experiment with one seed, and writes the result."""
    import cv2
    import torch
    from mmengine.logging import MMLogger

    from mmdenoiserep.apis.config import load_config
    from studies.robustness_fits import FitsRun
    from studies.robustness_rivals import RivalsRun
    from studies.robustness_run import path_of, read_part

    name, seed, part = args.one[0], int(args.one[1]), args.one[2]
    folder = study.seed_folder(args.work_dir, name, seed)
    if not (folder / 'baseline.json').exists():
        raise InputError(f'{folder} has no trained baseline; start this program without --one')
    started = time.process_time()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    experiment = study.EXPERIMENTS[name]
    about = experiment, folder, seed, load_config(experiment.config(), args.cfg_options)
    with torch.no_grad():
        if part == 'rivals':
            result = RivalsRun(*about).measure()
        else:
            result = FitsRun(*about).measure(read_part(folder, 'rivals')['filters'])
    result['cpu_seconds'] = time.process_time() - started
    with write_file(path_of(folder, part)) as file:
        file.write(json.dumps(result, indent=1).encode())


def main() -> None:
    """Runs the missing measurements, and writes the page and the picture."""
    parser = study.make_parser(__doc__, Path('docs/domain.md'))
    parser.add_argument('--one', nargs=3, help=argparse.SUPPRESS)  # NAME SEED PART: one measurement in this process
    args = study.parse_args(parser)
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT
    warnings.simplefilter('ignore')
    if args.one:
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

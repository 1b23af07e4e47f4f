"""Trains small models with and without denoising over several seeds, and writes the page of the results.

For each experiment and seed, trains a baseline and fine-tunes it three times: without denoisers (the control), with
denoisers (joint mode), and with denoisers alone, without labels. The denoised models are fused and evaluated in the
config of the baseline. Every step is a command of the project, with one thread. Finished steps are not repeated, so an
interrupted study continues when it is started again.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from studies.commands import last_checkpoint, last_metric, run, scalars, versions
from studies.study_report import STAGES, Result, report, write_page

ROOT = Path(__file__).absolute().parents[1]
PACKAGES = 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'
DATA = {
    'scenes': 'studies.make_scenes',
    'fashion-mnist': 'studies.prepare_fashion_mnist',
    'fashion-reid': 'studies.make_reid',
}
"""The module that writes each data set to ``work_dirs/<data set>``; configs end with the name of the data set."""


@dataclass(frozen=True)
class Experiment:
    """A model and its data set.

    Attributes:
        title: Name of the model in the report.
        name: Name of the baseline's config in ``configs/demo``; the other configs have a suffix.
        metrics: Key in the log by name of the metric in the report.
    """

    title: str
    name: str
    metrics: dict[str, str]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.name.split('_')[-1]

    def config(self, suffix: str = '') -> str:
        """Returns the path of the baseline's config, or with a suffix, of the control's or the denoised config."""
        return f'configs/demo/{self.name}{suffix}.py'


EXPERIMENTS = {
    'vit': Experiment('ViT', 'vit_fashion-mnist', {'top-1': 'accuracy/top1'}),
    'swin': Experiment('Swin', 'swin_fashion-mnist', {'top-1': 'accuracy/top1'}),
    'resnet': Experiment('ResNet', 'resnet_fashion-mnist', {'top-1': 'accuracy/top1'}),
    'vmamba': Experiment('VMamba', 'vmamba_fashion-mnist', {'top-1': 'accuracy/top1'}),
    'segformer': Experiment('SegFormer MiT', 'segformer_mit_scenes', {'mIoU': 'mIoU'}),
    'mask-rcnn': Experiment(
        'Mask R-CNN Swin', 'mask-rcnn_swin_scenes', {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'}
    ),
    'reid': Experiment('ViT, re-identification', 'vit_fashion-reid', {'mAP': 'reid/mAP', 'rank-1': 'reid/rank1'}),
}
METRICS = {
    'accuracy/top1': (1, 0.01),
    'mIoU': (1, 0.01),
    'reid/mAP': (1, 0.0),
    'reid/rank1': (1, 0.0),
    'coco/bbox_mAP': (100, 0.1),
    'coco/segm_mAP': (100, 0.1),
}
"""By key in the log: the factor to percent, and the rounding step of the log in percent (0 without rounding)."""
NOTE = 'study.json'


def make_parser(description: str, out: Path) -> argparse.ArgumentParser:
    """Returns the argument parser of a study that writes its page to ``out`` by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        '--experiments', nargs='+', choices=EXPERIMENTS, default=list(EXPERIMENTS), help='default: all of them'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--jobs', type=int, default=2, help='number of processes (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'), help='default: %(default)s')
    parser.add_argument('--out', type=Path, default=out, help='page to write (default: %(default)s)')
    parser.add_argument('--report', action='store_true', help='only write the page from the results in the work dir')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override settings of every config'
    )
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line."""
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error('--jobs must be 1 or more')
    return args


def step(folder: Path, name: str, *command: str) -> None:
    """Runs one command unless it is finished already; keeps its log and its duration in the folder."""
    done = folder / f'{name}.json'
    if done.exists():
        if json.loads(done.read_text())['command'] != list(command):
            raise InputError(f'{done} is from another command; remove {folder}, or take another --work-dir')
        return
    shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = run(f'{folder}: {name}', *command, log=folder / f'{name}.log')
    done.write_text(json.dumps(dict(command=command, seconds=seconds)))


def train(folder: Path, name: str, config: str, seed: int, overrides: list[str]) -> None:
    """Trains one model, see :func:`step`."""
    options = ['--cfg-options', f'randomness.seed={seed}', *overrides]
    step(folder, name, 'tools/train.py', config, '--work-dir', str(folder / name), *options)


def run_seed(experiment: Experiment, seed: int, folder: Path, overrides: list[str]) -> None:
    """Runs all steps of one experiment with one seed."""
    train(folder, 'baseline', experiment.config(), seed, overrides)
    more = [*overrides, f'load_from={last_checkpoint(folder / "baseline")}']
    train(folder, 'control', experiment.config('_baseline-ft'), seed, more)
    denoised = experiment.config('_denoiserep')
    options = ['--cfg-options', f'randomness.seed={seed}', *overrides]
    for mode, trained, fused in (('joint', 'denoised', 'fused'), ('label_free', 'label-free', 'label-free-fused')):
        train(folder, trained, denoised, seed, [*more, f'custom_hooks.0.mode={mode}'])
        files = [last_checkpoint(folder / trained), str(folder / f'{fused}.pth')]
        step(folder, f'fuse-{trained}', 'tools/fuse_checkpoint.py', *files, '--overwrite', '--verify', denoised)
        evaluate = ['tools/test.py', experiment.config(), files[1], '--work-dir', str(folder / fused)]
        step(folder, fused, *evaluate, *options)


def count_images(data: str) -> int:
    """Returns the number of training images of a data set."""
    if folder := {'scenes': 'images/training', 'fashion-reid': 'bounding_box_train'}.get(data):
        return len(list(Path('work_dirs', data, folder).iterdir()))
    return Path('work_dirs/fashion-mnist/train-labels-idx1-ubyte').stat().st_size - 8  # one byte a label


def run_all(args: argparse.Namespace, one: Callable[..., None], note: str, packages: Iterable[str] = PACKAGES) -> None:
    """Prepares the data, runs every experiment with every seed, and writes a note about the run.

    Args:
        args: The parsed arguments.
        one: Function with the signature of :func:`run_seed` that runs one experiment with one seed.
        note: Name of the file of :func:`write_note` in the work dir.
        packages: Modules whose versions the note has.
    """
    started = time.perf_counter()
    os.environ['OMP_NUM_THREADS'] = '1'
    data_sets = sorted({EXPERIMENTS[name].data for name in args.experiments})
    for data in data_sets:
        if not Path('work_dirs', data).exists():
            run(f'prepare {data}', '-m', DATA[data], f'work_dirs/{data}')
    pool = ThreadPoolExecutor(args.jobs)
    futures = [
        pool.submit(one, EXPERIMENTS[name], seed, seed_folder(args.work_dir, name, seed), args.cfg_options)
        for seed in args.seeds
        for name in args.experiments
    ]
    try:
        for future in as_completed(futures):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        write_note(args.work_dir / note, args.jobs, data_sets, time.perf_counter() - started, packages)


def write_note(path: Path, jobs: int, data_sets: list[str], seconds: float, packages: Iterable[str]) -> None:
    """Writes the command, hardware, software and times for the page; times add up over all calls of the program."""
    before = json.loads(path.read_text()) if path.exists() else dict(seconds=0, cpu_seconds=0, images={})
    note = dict(
        command=shlex.join(['python', '-m', f'studies.{Path(sys.argv[0]).stem}', *sys.argv[1:]]),
        cores=os.cpu_count(),
        jobs=jobs,
        seconds=before['seconds'] + seconds,
        cpu_seconds=before['cpu_seconds'] + os.times().children_user + os.times().children_system,
        images=before['images'] | {data: count_images(data) for data in data_sets},
        versions={'Python': platform.python_version()} | versions(packages),
    )
    path.write_text(json.dumps(note, indent=1))


def seed_folder(work_dir: Path, name: str, seed: int) -> Path:
    """Returns the folder of one experiment with one seed."""
    return work_dir / name / f'seed_{seed}'


def read_results(work_dir: Path, images: dict[str, int]) -> list[Result]:
    """Reads the finished runs in a work dir.

    Args:
        work_dir: The work dir.
        images: Number of training images of each data set.
    """
    results = []
    for name, experiment in EXPERIMENTS.items():
        folders = {
            int(done.parent.name.split('_')[1]): done.parent
            for done in work_dir.glob(f'{name}/seed_*/{STAGES[-1]}.json')
        }
        seeds = sorted(folders)
        if not seeds:
            continue
        logs = {
            stage: [[entry for entry in scalars(folders[seed] / stage) if 'loss' in entry] for seed in seeds]
            for stage in ('baseline', 'denoised', 'label-free')
        }
        weight = loss_weight(experiment.config('_denoiserep'))
        results.append(
            Result(
                title=experiment.title,
                data=experiment.data,
                images=images[experiment.data],
                seeds=seeds,
                iterations=tuple(logs[stage][0][-1]['step'] for stage in ('baseline', 'denoised')),
                metrics={
                    metric: {
                        stage: [METRICS[key][0] * last_metric(folders[seed] / stage, key) for seed in seeds]
                        for stage in STAGES
                    }
                    for metric, key in experiment.metrics.items()
                },
                steps={metric: METRICS[key][1] for metric, key in experiment.metrics.items()},
                losses=[tuple(log[i]['loss_denoise'] / weight for i in (0, -1)) for log in logs['denoised']],
                label_free_losses=[tuple(log[i]['loss_denoise'] for i in (0, -1)) for log in logs['label-free']],
            )
        )
    return results


def loss_weight(config: str) -> float:
    """Returns the weight of ``loss_denoise`` in a denoised config."""
    from mmengine.config import Config

    return next(hook.weight for hook in Config.fromfile(config).custom_hooks if hook.type == 'DenoiseLossHook')


def main() -> None:
    """Runs the missing steps and writes the page."""
    args = parse_args(make_parser(__doc__, Path('docs/study.md')))
    os.chdir(ROOT)
    warnings.simplefilter('ignore')
    if not args.report:
        run_all(args, run_seed, NOTE)
    note = args.work_dir / NOTE
    if not note.exists():
        raise InputError(f'{args.work_dir} holds no study; start it without --report')
    note = json.loads(note.read_text())
    results = read_results(args.work_dir, note['images'])
    if not results:
        raise InputError(f'no run in {args.work_dir} is finished; the same command without --report goes on')
    text = report(results, note)
    write_page(args.out, text)
    print(f'\n{text}\n\nWritten to {args.out}')


if __name__ == '__main__':
    launch(main)

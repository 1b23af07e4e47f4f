"""Trains a small Mask R-CNN on composed scenes, continues it with and without denoising, fuses, and compares.

Every step is one of the commands that users run themselves; it is printed before it runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    'baseline': 'configs/demo/mask-rcnn_swin_scenes.py',
    'control': 'configs/demo/mask-rcnn_swin_baseline-ft_scenes.py',
    'denoised': 'configs/demo/mask-rcnn_swin_denoiserep_scenes.py',
}
WORK = Path('work_dirs/demo')
FUSED = WORK / 'denoised_fused.pth'


def run(title: str, *command: str) -> None:
    """Prints and runs one command of the project; its failure ends the demo."""
    print(f'\n=== {title}\n$ python {" ".join(command)}', flush=True)
    started = time.perf_counter()
    environment = {**os.environ, 'PYTHONWARNINGS': 'ignore'}  # the stack warns about its own old habits, often
    if code := subprocess.run([sys.executable, *command], env=environment).returncode:
        sys.exit(f'demo: this step failed with exit code {code}: {title}')
    print(f'=== done in {time.perf_counter() - started:.0f} s', flush=True)


def checkpoint(name: str) -> str:
    """Returns the path of the last checkpoint of a training."""
    return (WORK / name / 'last_checkpoint').read_text().strip()


def scalars(name: str) -> list[dict]:
    """Returns everything that the last run in a work dir logged, oldest first."""
    newest = max((WORK / name).glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:  # an evaluation writes its metrics beside its log
        newest = max((WORK / name).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in newest.read_text().splitlines()]


def average_precision(name: str) -> tuple[float, float]:
    """Returns box and mask AP of the last evaluation in a work dir."""
    metrics = next(entry for entry in reversed(scalars(name)) if 'coco/bbox_mAP' in entry)
    return metrics['coco/bbox_mAP'], metrics['coco/segm_mAP']


def main() -> None:
    """Runs the demo from scratch in ``work_dirs/``."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.chdir(ROOT)
    started = time.perf_counter()
    shutil.rmtree(WORK, ignore_errors=True)
    run('1/7 Compose scenes from Fashion-MNIST articles', 'tools/make_scenes.py', 'work_dirs/scenes', '--overwrite')
    for step, (name, title) in enumerate(
        {
            'baseline': 'Train the baseline',
            'control': 'Continue it without denoising (the control)',
            'denoised': 'Continue it with denoisers (joint mode), and evaluate it unfused',
        }.items(),
        start=2,
    ):
        run(f'{step}/7 {title}', 'tools/train.py', CONFIGS[name], '--work-dir', str(WORK / name))
    fuse = ['tools/fuse_checkpoint.py', checkpoint('denoised'), str(FUSED), '--verify', CONFIGS['denoised']]
    run('5/7 Fold the denoisers into the weights', *fuse)
    evaluate = ['tools/test.py', CONFIGS['baseline'], str(FUSED), '--work-dir', str(WORK / 'fused')]
    run("6/7 Evaluate the fused file in the baseline's unchanged config", *evaluate)

    print('\n=== 7/7 Compare and draw', flush=True)
    warnings.simplefilter('ignore')
    import demo_report

    metrics = {name: average_precision(name) for name in (*CONFIGS, 'fused')}
    models = demo_report.load_models(CONFIGS, {name: checkpoint(name) for name in CONFIGS}, FUSED)
    report = demo_report.table(models, metrics)
    (WORK / 'report.txt').write_text(report + '\n')
    demo_report.draw(models, {name: scalars(name) for name in CONFIGS}, WORK / 'demo.png')
    print(report)
    print(f'\nPicture: {WORK / "demo.png"}   table: {WORK / "report.txt"}')
    print(f'Whole demo: {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores')


if __name__ == '__main__':
    main()

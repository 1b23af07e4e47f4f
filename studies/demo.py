"""Trains a small Mask R-CNN, fine-tunes it with and without denoising, fuses it, and fits the baseline to noise.

The domain fit uses unlabelled noisy scenes; it is evaluated on other noisy scenes. Every step is a command of the
project, which is printed before it runs.
"""

import argparse
import os
import shutil
import time
import warnings
from itertools import count
from pathlib import Path

from denoiserep_commands import launch
from studies.commands import last_checkpoint, last_metric, run, scalars

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    'baseline': 'configs/demo/mask-rcnn_swin_scenes.py',
    'control': 'configs/demo/mask-rcnn_swin_scenes_baseline-ft.py',
    'denoised': 'configs/demo/mask-rcnn_swin_scenes_denoiserep.py',
}
WORK = Path('work_dirs/demo')
STEPS = 12
FUSED, FITTED = WORK / 'denoised_fused.pth', WORK / 'fitted_to_noise.pth'
NOISY = WORK / 'noisy'


def main() -> None:
    """Runs the demo from scratch in ``work_dirs/``."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.chdir(ROOT)
    started = time.perf_counter()
    shutil.rmtree(WORK, ignore_errors=True)
    step = count(1)

    def do(title: str, *command: str) -> None:
        run(f'{next(step)}/{STEPS} {title}', *command)

    do('Compose scenes from Fashion-MNIST articles', '-m', 'studies.make_scenes', 'work_dirs/scenes', '--overwrite')
    for name, title in {
        'baseline': 'Train the baseline',
        'control': 'Fine-tune it without denoising (the control)',
        'denoised': 'Fine-tune it with denoisers (joint mode), and evaluate it unfused',
    }.items():
        do(title, 'tools/train.py', CONFIGS[name], '--work-dir', str(WORK / name))
    fuse = ['tools/fuse_checkpoint.py', last_checkpoint(WORK / 'denoised'), str(FUSED), '--verify', CONFIGS['denoised']]
    do('Fold the denoisers into the weights', *fuse)
    evaluate = ['tools/test.py', CONFIGS['baseline'], str(FUSED), '--work-dir', str(WORK / 'fused')]
    do("Evaluate the fused file in the baseline's unchanged config", *evaluate)

    baseline, source = [CONFIGS['baseline'], last_checkpoint(WORK / 'baseline')], str(WORK / 'moments.pth')
    corrupt = ['tools/analysis_tools/corrupt_images.py', 'work_dirs/scenes/images', str(NOISY), 'noise']
    do('Add noise to all scenes', *corrupt)
    do('Gather moments of the clean training scenes', 'tools/calibrate.py', 'moments', *baseline, source)
    images = ['--images', str(NOISY / 'training'), '--num-images', '300']
    fit = ['tools/calibrate.py', 'domain', *baseline, str(FITTED), '--source', source, *images, '--verify']
    do('Fit the baseline to noisy training scenes, without labels', *fit)
    noisy = ['--cfg-options', f'test_dataloader.dataset.data_prefix.img=../demo/{NOISY.name}/validation/']
    do('Evaluate the baseline on noisy scenes', 'tools/test.py', *baseline, '--work-dir', str(WORK / 'noise'), *noisy)
    evaluate = ['tools/test.py', CONFIGS['baseline'], str(FITTED), '--work-dir', str(WORK / 'fitted'), *noisy]
    do('Evaluate the fitted file in the unchanged config', *evaluate)

    print(f'\n=== {next(step)}/{STEPS} Compare and draw', flush=True)
    warnings.simplefilter('ignore')
    from studies import demo_report

    average_precision = 'coco/bbox_mAP', 'coco/segm_mAP'
    stages = *CONFIGS, 'fused', 'noise', 'fitted'
    metrics = {name: tuple(last_metric(WORK / name, key) for key in average_precision) for name in stages}
    checkpoints = {name: last_checkpoint(WORK / name) for name in CONFIGS} | dict(fused=FUSED, fitted=FITTED)
    models = demo_report.load_models(CONFIGS, checkpoints)
    report = demo_report.table(models, metrics)
    (WORK / 'report.txt').write_text(report + '\n')
    logs = {name: scalars(WORK / name) for name in CONFIGS}
    demo_report.draw(models, logs, NOISY / 'validation', WORK / 'demo.png')
    print(report)
    print(f'\nPicture: {WORK / "demo.png"}   table: {WORK / "report.txt"}')
    print(f'Whole demo: {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores')


if __name__ == '__main__':
    launch(main)

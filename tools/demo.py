"""Trains a small Mask R-CNN on composed scenes, continues it with and without denoising, fuses, and compares.

Every step is one of the commands that users run themselves; it is printed before it runs.
"""

import argparse
import os
import shutil
import time
import warnings
from pathlib import Path

from steps import last_checkpoint, last_metric, run, scalars

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    'baseline': 'configs/demo/mask-rcnn_swin_scenes.py',
    'control': 'configs/demo/mask-rcnn_swin_scenes_baseline-ft.py',
    'denoised': 'configs/demo/mask-rcnn_swin_scenes_denoiserep.py',
}
WORK = Path('work_dirs/demo')
FUSED = WORK / 'denoised_fused.pth'


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
    fuse = ['tools/fuse_checkpoint.py', last_checkpoint(WORK / 'denoised'), str(FUSED), '--verify', CONFIGS['denoised']]
    run('5/7 Fold the denoisers into the weights', *fuse)
    evaluate = ['tools/test.py', CONFIGS['baseline'], str(FUSED), '--work-dir', str(WORK / 'fused')]
    run("6/7 Evaluate the fused file in the baseline's unchanged config", *evaluate)

    print('\n=== 7/7 Compare and draw', flush=True)
    warnings.simplefilter('ignore')
    import demo_report

    average_precision = 'coco/bbox_mAP', 'coco/segm_mAP'
    metrics = {name: tuple(last_metric(WORK / name, key) for key in average_precision) for name in (*CONFIGS, 'fused')}
    models = demo_report.load_models(CONFIGS, {name: last_checkpoint(WORK / name) for name in CONFIGS}, FUSED)
    report = demo_report.table(models, metrics)
    (WORK / 'report.txt').write_text(report + '\n')
    demo_report.draw(models, {name: scalars(WORK / name) for name in CONFIGS}, WORK / 'demo.png')
    print(report)
    print(f'\nPicture: {WORK / "demo.png"}   table: {WORK / "report.txt"}')
    print(f'Whole demo: {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores')


if __name__ == '__main__':
    main()

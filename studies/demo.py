"""Trains a small Mask R-CNN, fits it to noise, fine-tunes it with and without denoising, and fuses it.

The domain fit uses unlabelled noisy scenes; it is evaluated on other noisy scenes. Every step is a command of the
project, which is printed before it runs. The picture grows with the results.
"""

import argparse
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from denoiserep_commands import launch
from studies.commands import last_checkpoint, last_metric, run, scalars

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    'baseline': 'configs/demo/mask-rcnn_swin_scenes.py',
    'control': 'configs/demo/mask-rcnn_swin_scenes_baseline-ft.py',
    'denoised': 'configs/demo/mask-rcnn_swin_scenes_denoiserep.py',
}
WORK = Path('work_dirs/demo')
FUSED, FITTED = WORK / 'denoised_fused.pth', WORK / 'fitted_to_noise.pth'
NOISY = WORK / 'noisy'
PICTURE, REPORT = WORK / 'demo.png', WORK / 'report.txt'
STEPS = {
    'Compose scenes from Fashion-MNIST articles': 5,
    'Train the baseline': 230,
    'Add noise to all scenes': 4,
    'Evaluate the baseline on noisy scenes': 11,
    'Gather moments of the clean training scenes': 15,
    'Fit the baseline to noisy training scenes, without labels': 28,
    'Evaluate the fitted file in the unchanged config': 10,
    'Fine-tune the baseline without denoising (the control)': 45,
    'Fine-tune it with denoisers (joint mode), and evaluate it unfused': 50,
    'Fold the denoisers into the weights': 6,
    "Evaluate the fused file in the baseline's unchanged config": 9,
    'Compare and draw': 8,
}
"""The steps, and the seconds that they take on two idle cores."""
TRUST = 120
"""Seconds for which the expected pace counts in the present one, which a short first step alone would not tell."""


class Progress:
    """Says which step begins, how long all steps that are left will take, and what has been found."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.done: list[str] = []
        self.stages: list[str] = []
        self.checkpoints: dict[str, str | Path] = {}

    def begin(self, title: str) -> str:
        """Returns the title of a step with its number and the time left, at the pace of the steps before."""
        expected = sum(STEPS[name] for name in self.done)
        pace = (time.perf_counter() - self.started + TRUST) / (expected + TRUST)
        left = pace * sum(seconds for name, seconds in STEPS.items() if name not in self.done)
        self.done.append(title)
        minutes = f'{left / 60:.0f} minutes' if left >= 90 else f'{left:.0f} seconds'
        return f'{len(self.done)}/{len(STEPS)} {title} ({minutes} left for all steps)'

    def run(self, title: str, *command: str) -> None:
        """Runs the command of a step."""
        run(self.begin(title), *command)

    def found(self, stage: str) -> None:
        """Prints the accuracy of an evaluation, which the work dir of that name holds."""
        self.stages.append(stage)
        box, mask = accuracy(stage)
        print(f'==> {stage}: box AP {box:.3f}, mask AP {mask:.3f}', flush=True)

    def draw(self, **checkpoints: str | Path) -> 'dict[str, nn.Module]':
        """Draws the picture with more detectors, and returns all so far."""
        from studies import demo_report

        self.checkpoints |= checkpoints
        models = demo_report.load_models(CONFIGS, self.checkpoints)
        logs = {name: scalars(WORK / name) for name in CONFIGS if name in self.stages}
        demo_report.draw(models, logs, NOISY / 'validation', PICTURE)
        print(f'==> the picture so far: {PICTURE}', flush=True)
        return models


def accuracy(stage: str) -> tuple[float, float]:
    """Returns box AP and mask AP of the last evaluation of a stage."""
    box, mask = (last_metric(WORK / stage, key) for key in ('coco/bbox_mAP', 'coco/segm_mAP'))
    return box, mask


def main() -> None:
    """Runs the demo from scratch in ``work_dirs/``."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    warnings.simplefilter('ignore')
    progress = Progress()
    do = progress.run

    scenes = ['-m', 'studies.make_scenes', 'work_dirs/scenes', '--overwrite']
    do('Compose scenes from Fashion-MNIST articles', *scenes)
    do('Train the baseline', 'tools/train.py', CONFIGS['baseline'], '--work-dir', str(WORK / 'baseline'))
    progress.found('baseline')
    baseline, source = [CONFIGS['baseline'], last_checkpoint(WORK / 'baseline')], str(WORK / 'moments.pth')
    progress.draw(baseline=baseline[1])

    corrupt = ['tools/analysis_tools/corrupt_images.py', 'work_dirs/scenes/images', str(NOISY), 'noise']
    do('Add noise to all scenes', *corrupt)
    noisy = ['--cfg-options', f'test_dataloader.dataset.data_prefix.img=../demo/{NOISY.name}/validation/']
    do('Evaluate the baseline on noisy scenes', 'tools/test.py', *baseline, '--work-dir', str(WORK / 'noise'), *noisy)
    progress.found('noise')
    do('Gather moments of the clean training scenes', 'tools/calibrate.py', 'moments', *baseline, source)
    images = ['--images', str(NOISY / 'training'), '--num-images', '300']
    fit = ['tools/calibrate.py', 'domain', *baseline, str(FITTED), '--source', source, *images, '--verify']
    do('Fit the baseline to noisy training scenes, without labels', *fit)
    evaluate = ['tools/test.py', CONFIGS['baseline'], str(FITTED), '--work-dir', str(WORK / 'fitted'), *noisy]
    do('Evaluate the fitted file in the unchanged config', *evaluate)
    progress.found('fitted')
    progress.draw(fitted=FITTED)

    for name, title in {
        'control': 'Fine-tune the baseline without denoising (the control)',
        'denoised': 'Fine-tune it with denoisers (joint mode), and evaluate it unfused',
    }.items():
        do(title, 'tools/train.py', CONFIGS[name], '--work-dir', str(WORK / name))
        progress.found(name)
    fuse = ['tools/fuse_checkpoint.py', last_checkpoint(WORK / 'denoised'), str(FUSED), '--verify', CONFIGS['denoised']]
    do('Fold the denoisers into the weights', *fuse)
    evaluate = ['tools/test.py', CONFIGS['baseline'], str(FUSED), '--work-dir', str(WORK / 'fused')]
    do("Evaluate the fused file in the baseline's unchanged config", *evaluate)
    progress.found('fused')

    print(f'\n=== {progress.begin("Compare and draw")}', flush=True)
    from studies import demo_report

    tuned = {name: last_checkpoint(WORK / name) for name in ('control', 'denoised')}
    models = progress.draw(**tuned, fused=FUSED)
    report = demo_report.table(models, {stage: accuracy(stage) for stage in progress.stages})
    REPORT.write_text(report + '\n')
    print(f'\n{report}\n\nPicture: {PICTURE}   table: {REPORT}')
    minutes = (time.perf_counter() - progress.started) / 60
    print(f'Whole demo: {minutes:.1f} minutes on {os.cpu_count()} cores')


if __name__ == '__main__':
    launch(main)

"""The table and the picture of the demo."""

import copy
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from torch import nn

from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.model import open_model
from mmdenoiserep.core import evaluating, format_table, verify_fusion
from studies.benchmarks.measure import alternate, cost_ratio

matplotlib.use('Agg')
MIN_SCORE = 0.5
"""Smallest score of a detection that is drawn."""


def load_models(configs: dict[str, str], checkpoints: dict[str, str | Path]) -> dict[str, nn.Module]:
    """Returns the detector of each checkpoint in eval mode; checkpoints without a config take the baseline's."""
    MMLogger.get_current_instance().setLevel('ERROR')
    models = {}
    for name, checkpoint in checkpoints.items():
        cfg = load_config(configs.get(name, configs['baseline']))
        models[name], _ = open_model(cfg, str(checkpoint), denoisers='keep')
        models[name].cfg = cfg
    return models


def table(models: dict[str, nn.Module], metrics: dict[str, tuple[float, float]]) -> str:
    """Returns the report: accuracy of each stage, exactness of the fusion, and cost of the fused model."""
    clean = {name: metrics[name] for name in ('baseline', 'control', 'denoised', 'fused')}
    noisy = {'baseline': metrics['noise'], 'fitted to noisy scenes': metrics['fitted']}
    lost, regained = (metrics[name][0] - metrics['noise'][0] for name in ('baseline', 'fitted'))
    share = f' ({regained / lost:.0%} of the lost box AP)' if lost > 0 else ''
    features = Features(models['denoised']), Features(models['fused'])
    exact = verify_fusion(*features, example_input=next(iter(_scenes(models['baseline'], 8)))['inputs'])
    cost = [_cost(models[name]) for name in ('baseline', 'fused', 'fitted')]
    latencies = {name: _latencies(models['baseline'], models[name]) for name in ('fused', 'fitted')}
    return '\n'.join(
        [
            _accuracy(clean),
            'The control had the same data, iterations and seed as the denoised detector. One seed: this shows the',
            'whole path, not a gain.',
            '',
            'On validation scenes with noise (standard deviation 40 of 255):',
            _accuracy(noisy),
            f'The fit saw 300 other noisy scenes and no label{share}; docs/domain.md has three seeds.',
            '',
            'Unfused against fused on 8 validation scenes:',
            str(exact),
            '',
            format_table(
                ('', 'parameters', 'FLOPs of backbone, neck and RPN'),
                [
                    (name, f'{p:,}', f'{f:,}')
                    for name, (p, f) in zip(('baseline', 'fused', 'fitted'), cost, strict=True)
                ],
            ),
            *(
                f'Latency, {name} over baseline, batch 1, {torch.get_num_threads()} threads: '
                f'{cost_ratio(seconds["other"], seconds["baseline"])}, median and quartiles of '
                f'{len(seconds["other"])} alternating pairs'
                for name, seconds in latencies.items()
            ),
        ]
    )


def _accuracy(metrics: dict[str, tuple[float, float]]) -> str:
    base = metrics['baseline'][0]
    return format_table(
        ('detector', 'box AP', 'mask AP', 'box AP against the baseline'),
        [(name, f'{box:.3f}', f'{mask:.3f}', f'{box - base:+.3f}') for name, (box, mask) in metrics.items()],
    )


class Features(nn.Module):
    """The outputs of a detector before any threshold."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns FPN features, RPN scores and RPN boxes, each flattened over all levels.

        Args:
            images: Preprocessed images, (B, 3, H, W).
        """
        features = self.detector.extract_feat(images)
        outputs = zip(
            ('FPN features', 'RPN scores', 'RPN boxes'), (features, *self.detector.rpn_head(features)), strict=True
        )
        return {name: torch.cat([level.flatten() for level in levels]) for name, levels in outputs}


def _scenes(model: nn.Module, count: int):
    """Yields one preprocessed batch of the first ``count`` validation scenes with their data samples."""
    dataset = _dataset(model)
    yield model.data_preprocessor(pseudo_collate([dataset[i] for i in range(count)]))


def _dataset(model: nn.Module, images: Path | None = None):
    """Returns the data set of validation scenes, or of another folder of images with the same annotations."""
    config = copy.deepcopy(model.cfg.test_dataloader.dataset)
    if images:
        config.data_prefix.img = str(images.absolute())
    with redirect_stdout(None):  # pycocotools prints its progress
        return DATASETS.build(config)


def _cost(model: nn.Module) -> tuple[int, int]:
    """Returns the number of parameters, and mmengine's FLOPs of backbone, neck and RPN for one 128 x 128 image."""
    counted = get_model_complexity_info(Features(model), (3, 128, 128), show_table=False, show_arch=False)
    return sum(p.numel() for p in model.parameters()), int(counted['flops'])


def _latencies(baseline: nn.Module, other: nn.Module) -> dict[str, list[float]]:
    """Returns the seconds of 60 alternating runs of two detectors on one 128 x 128 image."""
    image = torch.zeros(1, 3, 128, 128)
    models = dict(baseline=Features(baseline), other=Features(other))
    with evaluating(*models.values()):
        return alternate({name: partial(model, image) for name, model in models.items()}, warm_up=10, repeats=60)


def draw(models: dict[str, nn.Module], logs: dict[str, list[dict]], noisy: Path, path: Path, scenes: int = 4) -> None:
    """Writes a picture with the detections on the first scenes with three or more articles, and the loss curves.

    Args:
        models: Detectors from :func:`load_models`; the picture has no columns for those that are missing.
        logs: Logged scalars of each training; without those of the denoised detector, there are no curves.
        noisy: Folder of the validation scenes with noise, if there is a fitted detector.
        path: File to write.
        scenes: Number of scenes.
    """
    from matplotlib import pyplot as plt

    clean = _dataset(models['baseline'])
    with_noise = _dataset(models['baseline'], noisy) if 'fitted' in models else None
    several = (i for i in range(len(clean)) if len(clean[i]['data_samples'].gt_instances) >= 3)
    chosen = list(islice(several, scenes))
    columns = {
        'truth': (None, clean),
        'baseline': ('baseline', clean),
        'control': ('control', clean),
        'denoised, fused': ('fused', clean),
        'noise: baseline': ('baseline', with_noise),
        'noise: fitted to it': ('fitted', with_noise),
    }
    columns = {title: part for title, part in columns.items() if part[1] and (part[0] is None or part[0] in models)}
    height = 3.4 if 'denoised' in logs else 0.1
    figure = plt.figure(figsize=(2.75 * len(columns), 2.8 * scenes + height), layout='constrained')
    pictures, curves = figure.subfigures(2, 1, height_ratios=(2.8 * scenes, height))
    grid = pictures.subplots(scenes, len(columns))
    for column, (title, (name, dataset)) in zip(grid.T, columns.items(), strict=True):
        batch = [dataset[i] for i in chosen]
        samples = [item['data_samples'] for item in batch]
        if name:
            with torch.no_grad():
                samples = models[name].test_step(pseudo_collate(batch))
        for axes, item, sample in zip(column, batch, samples, strict=True):
            image = item['inputs'].permute(1, 2, 0).numpy()
            instances = sample.pred_instances if name else sample.gt_instances
            axes.imshow(_overlay(image, instances, dataset.metainfo['classes']))
            axes.axis('off')
        column[0].set_title(title)
    if 'denoised' in logs:
        _draw_curves(curves, logs)
    figure.savefig(path, dpi=80)


def _draw_curves(figure: Any, logs: dict[str, list[dict]]) -> None:
    """Draws the detection loss of both fine-tunings, and the loss of the denoisers."""
    left, right = figure.subplots(1, 2)
    for name in ('control', 'denoised'):
        entries = [entry for entry in logs[name] if 'loss' in entry]
        steps = [entry['step'] for entry in entries]
        left.plot(steps, [entry['loss'] - entry.get('loss_denoise', 0) for entry in entries], label=name)
    entries = [entry for entry in logs['denoised'] if 'loss_denoise' in entry]
    right.plot([entry['step'] for entry in entries], [entry['loss_denoise'] for entry in entries], color='C1')
    left.set(title='detection loss', xlabel='iteration')
    left.legend()
    right.set(title='loss_denoise (weighted)', xlabel='iteration')


def _overlay(image: np.ndarray, instances, classes: tuple[str, ...], scale: int = 4) -> np.ndarray:
    """Returns an image, (H, W, 3), BGR, uint8, enlarged and as RGB, with masks, boxes and class names drawn on it."""
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)[..., ::-1].copy()
    scores = getattr(instances, 'scores', None)
    masks = instances.masks.masks if hasattr(instances.masks, 'masks') else instances.masks.numpy()
    palette = matplotlib.colormaps['tab10']
    for i, label in enumerate(instances.labels.tolist()):
        if scores is not None and scores[i] < MIN_SCORE:
            continue
        colour = [int(255 * c) for c in palette(label)[:3]]
        outline = cv2.resize(masks[i].astype(np.uint8), canvas.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        canvas[outline > 0] = (0.55 * canvas[outline > 0] + 0.45 * np.array(colour)).astype(np.uint8)
        x1, y1, x2, y2 = (int(round(v * scale)) for v in _corners(instances.bboxes[i]))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, 2)
        text = classes[label] + (f' {scores[i]:.2f}' if scores is not None else '')
        cv2.putText(canvas, text, (x1 + 3, max(y1, 2) + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(
            canvas, text, (x1 + 3, max(y1, 2) + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA
        )
    return canvas


def _corners(box) -> list[float]:
    return (box.tensor if hasattr(box, 'tensor') else box).flatten().tolist()

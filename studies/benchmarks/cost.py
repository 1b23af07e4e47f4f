"""Cost of denoisers: fused inference, unfused inference and training steps against the plain model.

ViT-S/16, Swin-T and ResNet-50 of mmpretrain and Mask R-CNN with Swin-T of mmdet, with random weights and images and
denoisers on every layer of the backbone. Runs on the GPU if there is one.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Shape:
    """A model and the shape of its input.

    Attributes:
        config: Config of the library.
        size: Height and width of the images in pixels.
        batch: Batch size.
    """

    config: str
    size: tuple[int, int]
    batch: int

    @property
    def library(self) -> str:
        """Module of the library of the config."""
        return self.config.partition('::')[0]


SHAPES = {
    'ViT-S/16': Shape('mmpretrain::deit/deit-small_4xb256_in1k.py', (224, 224), 16),
    'Swin-T': Shape('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', (224, 224), 16),
    'ResNet-50': Shape('mmpretrain::resnet/resnet50_8xb32_in1k.py', (224, 224), 16),
    'Mask R-CNN Swin-T': Shape('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', (256, 320), 2),
}
RANKS = {'default rank': {}, 'full rank': dict(rank=None)}
"""Arguments of DenoiseRepBackbone for each rank."""

PLAIN = 'plain'

GOALS = {
    'fused inference': (0.98, 1.02),
    'unfused inference': (0, 1.10),
    'joint step': (0, 1.05),
    'label-free step': (0, 1.10),
    'memory of a joint step': (0, 1.10),
}
"""Range of the ratio to the plain model at the default rank."""

PROCESSES = 3
"""Number of processes for the median of the memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--models', nargs='+', choices=SHAPES, default=list(SHAPES), help='default: all of them')
    parser.add_argument('--batch', type=int, help='images in a batch (default: 16, Mask R-CNN 2)')
    parser.add_argument('--repeats', type=int, default=5, help='timed training steps of each (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='mixed precision; its training steps need a GPU')
    parser.add_argument('--no-memory', action='store_true', help='skip the memory, which takes half of the time')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``rows``, one for each model.

    Raises:
        RuntimeError: The system does not report the memory.
        ValueError: The parameters or FLOPs of the fused and the plain model differ.
    """
    from studies.benchmarks.measure import cost_ratio

    rows = [compare(name, args.batch or SHAPES[name].batch, args) for name in args.models]
    lines = [
        '| model | what | plain | denoised | ratio at the default rank (quartiles) | goal | at full rank |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        for what, (low, high) in GOALS.items():
            if not (values := row['measured'].get(what)):
                continue
            form = '{:,.0f} MiB' if what.startswith('memory') else '{:.3f} s'
            plain, default = (form.format(median(values[name])) for name in (PLAIN, 'default rank'))
            ratios = {name: cost_ratio(values[name], values[PLAIN]) for name in values if name != PLAIN}
            verdict = 'met' if low <= ratios['default rank'].median <= high else 'missed'
            goal = f'{verdict} ({f"{low} to " if low else "at most "}{high})'
            full = ratios.get('full rank', '')
            lines.append(
                f'| {row["model"]} | {what} | {plain} | {default} | {ratios["default rank"]} | {goal} | {full} |'
            )
    lines += [
        '',
        '| model | backbone parameters | of the denoisers, default rank | full rank | fused, FLOPs of the backbone |',
        '|---|---|---|---|---|',
    ]
    for row in rows:
        extra = ' | '.join(f'{number:,} ({number / row["parameters"]:.1%})' for number in row['extra'].values())
        lines.append(
            f'| {row["model"]} | {row["parameters"]:,} | {extra} | the same {row["flops"]:,}, names and shapes too |'
        )
    note = (
        f'Denoisers on all layers. Seconds: medians of {args.repeats} alternating runs (inference: {3 * args.repeats})'
        '; ratios are taken pair by pair. A step is forward, backward and AdamW; the label-free step is compared with '
        'a forward of the plain model without gradients. Memory: '
        f'peak of the weights, the optimizer and two steps; median of {PROCESSES} processes.'
    )
    return '\n'.join([*lines, '', note]), dict(rows=rows, amp=args.amp)


def compare(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one model.

    Returns:
        ``model``; ``batch``; ``measured``: seconds or MiB of all runs by quantity and rank; ``parameters`` of the
        backbone; ``extra``: parameters of the denoisers by rank; ``flops`` of the backbone, plain and fused.
    """
    import torch
    from mmengine.analysis import FlopAnalyzer

    from mmdenoiserep import fuse_model
    from studies.benchmarks.measure import alternate, peak_memory

    print(f'{name}: takes minutes', file=sys.stderr, flush=True)
    plain = Run(name, batch, None, args.amp)
    denoised = {rank: Run(name, batch, rank, args.amp) for rank in RANKS}
    for each in denoised.values():
        make_denoisers_matter(each.model)
    fused = fuse_model(denoised['default rank'].model)
    models = {PLAIN: plain.model, 'fused': fused} | {rank: run.model for rank, run in denoised.items()}
    for model in models.values():
        model.eval()
    states = [{key: value.shape for key, value in m.state_dict().items()} for m in (fused, plain.model)]
    one = torch.randn(1, 3, *SHAPES[name].size, device=plain.device)
    flops = [int(FlopAnalyzer(m.backbone, one).total()) for m in (fused, plain.model)]
    if states[0] != states[1] or flops[0] != flops[1]:
        raise ValueError(f'the fused {name} is not the plain one: {flops} FLOPs')

    inputs = plain.model.data_preprocessor(plain.data, False)
    inference = alternate(
        {way: partial(infer, model, inputs, args.amp) for way, model in models.items()}, 2, 3 * args.repeats
    )
    measured = {
        'fused inference': {PLAIN: inference[PLAIN], 'default rank': inference.pop('fused')},
        'unfused inference': inference,
    }
    del fused, models
    runs = dict({PLAIN: plain}, **denoised)
    for mode, what in (('joint', 'joint step'), ('label_free', 'label-free step')):
        for each in runs.values():
            each.start(mode)
        measured[what] = alternate({way: each.step for way, each in runs.items()}, 1, args.repeats)
        for each in runs.values():
            each.end()
    backbone = plain.model.backbone
    extra = {
        rank: sum(p.numel() for key, p in each.model.backbone.named_parameters() if '.denoiser.' in key)
        for rank, each in denoised.items()
    }
    del runs, plain, denoised
    if not args.no_memory:
        libraries = ('torch', 'mmdenoiserep', f'{SHAPES[name].library}.models')
        measured['memory of a joint step'] = {
            way: [peak_memory(train_twice, name, batch, way, args.amp, imports=libraries) for _ in range(PROCESSES)]
            for way in (PLAIN, *RANKS)
        }
    return dict(
        model=name,
        batch=batch,
        measured=measured,
        parameters=sum(p.numel() for p in backbone.parameters()),
        extra=extra,
        flops=flops[0],
    )


class Run:
    """A model with data, an optimizer and, if it has denoisers, their DenoiseLossHook.

    Args:
        name: One of :data:`SHAPES`.
        batch: Batch size.
        rank: A name in :data:`RANKS`; None for the plain model.
        amp: Whether to train in mixed precision.
    """

    def __init__(self, name: str, batch: int, rank: str | None, amp: bool) -> None:
        import torch
        from mmengine.hub import get_config
        from mmengine.logging import MMLogger
        from mmengine.registry import MODELS, init_default_scope

        import mmdenoiserep  # noqa: F401

        MMLogger.get_current_instance().setLevel('ERROR')  # without the tables of the conversion
        shape = SHAPES[name]
        config = get_config(shape.config).model
        config.pop('train_cfg' if shape.library == 'mmpretrain' else '_', None)  # no mixing of images
        init_default_scope(shape.library)
        if rank is not None:
            config.backbone = dict(
                type='DenoiseRepBackbone', backbone=config.backbone, image_size=shape.size, **RANKS[rank]
            )
        if shape.library == 'mmpretrain':
            config.data_preprocessor = dict(mean=[127.5] * 3, std=[64] * 3)
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        torch.manual_seed(0)
        self.model = MODELS.build(config).to(self.device)
        self.data = make_batch(shape.library, shape.size, batch)
        self.amp = amp
        self.hook = None

    def start(self, mode: str) -> None:
        """Creates the optimizer, and the hook of a denoised model.

        Args:
            mode: ``mode`` of DenoiseLossHook. Instead of ``'label_free'`` steps, a plain model runs forwards without
                gradients.
        """
        import torch
        from mmengine.optim import AmpOptimWrapper, OptimWrapper

        from mmdenoiserep import DenoiseLossHook
        from mmdenoiserep.core import DenoiseLayer

        self.mode = mode
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)  # the work of AdamW, and the weights stay
        self.optimizer = (AmpOptimWrapper if self.amp else OptimWrapper)(optimizer=optimizer)
        self.runner: Any = SimpleNamespace(model=self.model, optim_wrapper=self.optimizer, world_size=1, iter=0, rank=0)
        if any(isinstance(m, DenoiseLayer) for m in self.model.modules()):
            self.hook = DenoiseLossHook(mode)
            self.hook.before_train(self.runner)

    def step(self) -> None:
        """Makes one training step, from the same random numbers every time."""
        import torch

        seed_all()
        if self.mode == 'label_free' and self.hook is None:
            self.model.eval()
            with torch.no_grad(), self.optimizer.optim_context(self.model):
                self.model(**self.model.data_preprocessor(self.data, True), mode='loss')
            return
        self.model.train()
        if self.hook is not None:
            self.hook.before_train_iter(self.runner, 0)
        self.model.train_step(self.data, self.optimizer)

    def end(self) -> None:
        """Deletes the optimizer, the gradients and the hook."""
        if self.hook is not None:
            self.hook.after_train(self.runner)
            self.hook = None
        self.model.zero_grad()
        del self.optimizer, self.runner


def train_twice(name: str, batch: int, way: str, amp: bool) -> None:
    """Builds a model and makes two joint training steps; the second one starts with the state of the optimizer."""
    run = Run(name, batch, None if way == PLAIN else way, amp)
    run.start('joint')
    run.step()
    run.step()


def infer(model: 'nn.Module', inputs: dict[str, Any], amp: bool) -> None:
    """Runs the prediction of a model on preprocessed images."""
    import torch

    with torch.no_grad(), torch.autocast(inputs['inputs'].device.type, enabled=amp):
        model(**inputs, mode='predict')


def make_denoisers_matter(model: 'nn.Module') -> None:
    """Sets all denoisers to random values of the size after training."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if '.denoiser.' in key and not key.endswith('.down'):
            parameter.data.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))


def make_batch(library: str, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """Returns random images with labels, as the data loader of a library would."""
    import torch

    seed_all()
    if library == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(batch, [(3, *size)] * batch, num_items=[4] * batch, num_classes=80, with_mask=True)
    from mmpretrain.structures import DataSample

    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=[DataSample().set_gt_label(i) for i in range(batch)])


def seed_all() -> None:
    """Seeds the generators of Python, NumPy and torch with 0."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

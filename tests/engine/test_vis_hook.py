"""DenoiseVisHook: what a visualizer and TensorBoard get, read back from their files."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

from engine_helpers import TinyBackbone, denoised, inner, make_runner, refuse, tiny_model
from helpers import dense
from mmdenoiserep.core import DenoiseLayer
from mmdenoiserep.engine import DenoiseVisHook

LOCAL, BOARD = dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')
LOSS, SHOW = dict(type='DenoiseLossHook', weight=0.1), dict(type='DenoiseVisHook', interval=2)
LAYERS = {'backbone.stem': 3, 'backbone.conv': 6, 'backbone.shared': 8}
"""Layers of the tiny backbone, with their input channels."""


class Keep(Hook):
    """Keeps B, (C, C), and b~ of every layer after each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layers = {name: m for name, m in inner(runner).named_modules() if isinstance(m, DenoiseLayer)}
        self.seen[runner.iter + 1] = {
            name: (dense(layer), None if layer.denoiser.bias is None else layer.denoiser.bias.detach().clone())
            for name, layer in layers.items()
        }


def run(case, backends, **options):
    """Trains for five iterations; returns what the layers were after each, and the folder of the visualizer."""
    keep = Keep()
    runner = make_runner(
        case,
        tiny_model(denoised(**options)),
        [dict(type='Randomise'), LOSS, SHOW],
        visualizer=dict(type='Visualizer', vis_backends=backends),
        iterations=5,
        optim=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)),
    )
    runner.register_hook(keep)
    runner.train()
    runner.visualizer.close()
    return keep.seen, Path(runner.log_dir) / 'vis_data'


@pytest.mark.parametrize('rank', [None, 2])
def test_tensorboard_gets_every_layer_as_it_is(case, rank):
    seen, folder = run(case, [LOCAL, BOARD], rank=rank)
    events = EventAccumulator(str(folder), size_guidance={HISTOGRAMS: 0}).Reload()
    assert {name: len(matrix) for name, (matrix, _) in seen[1].items()} == LAYERS
    tags = set()
    for name in LAYERS:
        for i, (part, scale) in enumerate((('B', LAYERS[name] ** 0.5), ('b', 1))):
            if seen[1][name][i] is None:
                continue
            norms = events.Scalars(f'denoiser/{name}/norm_{part}')
            histograms = events.Histograms(f'denoiser/{name}/{part}')
            assert [event.step for event in norms] == [event.step for event in histograms] == [2, 4]
            for norm, histogram in zip(norms, histograms, strict=True):
                values = seen[norm.step][name][i].double()
                assert norm.value == pytest.approx(values.norm().item() / scale, rel=1e-5)
                if part == 'B' and name == 'backbone.conv':  # two groups
                    values = torch.stack([values[:3, :3], values[3:, 3:]])
                found = histogram.histogram_value
                assert found.num == values.numel()
                assert (found.min, found.max, found.sum, found.sum_squares) == pytest.approx(
                    (values.min().item(), values.max().item(), values.sum().item(), values.square().sum().item()),
                    rel=1e-5,
                    abs=1e-6,
                )
            assert norms[0].value != norms[1].value, 'the denoisers are trained in between'
            tags.add(f'denoiser/{name}/norm_{part}')
    assert {tag for tag in events.Tags()['scalars'] if tag.startswith('denoiser/')} == tags
    assert len(tags) == 3 + 2  # the stem pads zeros and has no bias


def test_without_tensorboard_there_are_scalars(case):
    seen, folder = run(case, [LOCAL])
    lines = [json.loads(line) for line in (folder / 'scalars.json').read_text().splitlines()]
    tag = 'denoiser/backbone.shared/norm_B'
    found = {line['step']: line[tag] for line in lines if tag in line}
    expected = {step: (seen[step]['backbone.shared'][0].norm() / 8**0.5).item() for step in (2, 4)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert not list(folder.glob('events*'))


def test_a_denoiser_that_is_not_finite_does_not_end_the_run(case):
    runner = make_runner(case, tiny_model(), visualizer=dict(type='Visualizer', vis_backends=[BOARD]))
    hook = DenoiseVisHook(interval=1)
    hook.before_train(runner)
    inner(runner).backbone.shared.denoiser.weight.data[0, 1, 2] = torch.nan
    hook.after_train_iter(runner, 0)
    runner.visualizer.close()
    tags = EventAccumulator(str(Path(runner.log_dir) / 'vis_data')).Reload().Tags()
    assert 'denoiser/backbone.shared/norm_B' in tags['scalars']
    assert set(tags['histograms']) == {f'denoiser/backbone.{n}' for n in ('stem/B', 'conv/B', 'conv/b', 'shared/b')}


def test_a_model_without_denoisers_is_refused(case):
    refuse(make_runner(case, tiny_model(dict(type=TinyBackbone.__name__)), [SHOW]), 'no denoisers')

"""Tests of ``tools/benchmark.py calibrate``, here on tiny models."""

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import ROOT

sys.path.append(str(ROOT / 'tools'))

from benchmarks import calibrate as benchmark  # noqa: E402
from benchmarks import measure  # noqa: E402
from mmdenoiserep.core import DenoiseLayer, apply_denoiserep, collect_moments  # noqa: E402

PASSES = ['schedule, some vectors', 'domain, some vectors', 'schedule, all vectors']


def tiny(name, images):
    """Returns a small model with both kinds of layers; more channels than the low rank."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 70, 4, stride=4), nn.ReLU(), nn.Conv2d(70, 66, 1), nn.Flatten(2), nn.Linear(64, 4)
    return nn.Sequential(*layers).eval()


def main(*args):
    """Returns what the benchmark returns for these options."""
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return benchmark.run(
        parser.parse_args(['--size', '32', '--batch', '2', '--batches', '2', '--every', '8', *map(str, args)])
    )


@pytest.fixture
def peaks(monkeypatch):
    """Has the tiny models measured; gives what a process of its own would be asked to run, with 10, 20, ... MiB."""
    calls = []

    def peak_memory(function, model, *args):
        function, model, args = pickle.loads(pickle.dumps((function, model, args)))
        function(model, *args)
        calls.append((function, model, args))
        return 10.0 * len(calls)

    monkeypatch.setattr(benchmark, 'build', tiny)
    monkeypatch.setattr(measure, 'peak_memory', peak_memory)
    return calls


def test_passes_solving_and_memory_are_reported(peaks):
    text, figures = main('--repeats', 3, '--memory')
    assert [row['model'] for row in figures['rows']] == ['ViT-S/16', 'ResNet-50']
    for row in figures['rows']:
        assert list(row['seconds']) == [benchmark.PLAIN, *PASSES]
        assert all(len(values) == 3 and min(values) > 0 for values in row['seconds'].values())
        assert len(row['solving']) == 4 and min(row['solving'].values()) > 0
        for name in PASSES:
            ratio = np.median(np.divide(row['seconds'][name], row['seconds'][benchmark.PLAIN]))
            shown = name.replace('some', 'one in 8')
            line = next(x for x in text.splitlines() if x.startswith(f'| {row["model"]} | {shown} | '))
            assert f' | {ratio:.2f} (' in line
    assert '| plain forward | 10 MiB | 60 MiB |' in text and '| domain, rank 64 | 50 MiB | 100 MiB |' in text


def test_memory_is_that_of_each_mode_and_rank(peaks):
    """Every process does all of its calibration: low rank in the denoisers of schedule mode, in the maps of domain."""
    main('--repeats', 1, '--memory')
    (plain, model, _), *fits = peaks[:5]
    assert plain is benchmark.forward and not any(isinstance(m, DenoiseLayer) for m in model.modules())
    asked = [
        (args[1], args[3], hasattr(model[0].denoiser, 'up'), hasattr(model[2].denoiser, 'up'))
        for _, model, args in fits
    ]
    assert asked == [
        ('schedule', None, False, False),
        ('domain', None, False, False),
        ('schedule', None, False, True),
        ('domain', 64, False, False),
    ]
    for function, model, args in fits:
        assert function is benchmark.fit and args[0].shape == (2, 3, 32, 32)
        assert any(p.any() for p in model[2].denoiser.parameters()) == (args[1] == 'schedule')


@pytest.mark.parametrize('factor', [1.2, 1.3])
def test_the_goal_is_judged_from_the_figures(peaks, monkeypatch, factor):
    """For the passes that take a part of the vectors."""
    times = {benchmark.PLAIN: 2.0, PASSES[0]: 2 * factor, PASSES[1]: 2.1, PASSES[2]: 9.0, 'solve': 1.0}
    monkeypatch.setattr(
        measure, 'alternate', lambda functions, warm_up, repeats: {name: [times[name]] * repeats for name in functions}
    )
    text, figures = main()
    assert not peaks and 'emory' not in text
    verdict = 'met' if factor < 1.25 else 'missed'
    first, second = (name.replace('some', 'one in 8') for name in PASSES[:2])
    assert (
        text.count(f'| {first} | {2 * factor:.2f} | 2.00 | {factor:.2f} ({factor:.2f} to {factor:.2f}) | {verdict} ')
        == 2
    )
    assert text.count(f'| {second} | 2.10 | 2.00 | 1.05 (1.05 to 1.05) | met ') == 2
    assert text.count('| 4.50 (4.50 to 4.50) |  |') == 2
    assert all(set(row['solving'].values()) == {3.0} for row in figures['rows'])  # three layers, a second each


def test_layers_of_one_width_are_solved_once_and_counted(monkeypatch):
    calls = []

    def alternate(functions, warm_up, repeats):
        calls.extend(functions)
        functions['solve']()
        return {'solve': [0.5]}

    monkeypatch.setattr(measure, 'alternate', alternate)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 7), nn.Linear(7, 3))
    x = torch.randn(20, 5)
    apply_denoiserep(model, 'all', example_input=x)
    moments = collect_moments(model, [x])
    seconds = benchmark.time_solving(model, moments, moments)
    assert set(seconds.values()) == {2.0} and len(calls) == 4 * 2


def test_the_models_are_those_of_the_report():
    """And the ResNet's BatchNorm has the statistics of the images, so that its features neither die nor explode."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    vit, resnet = (benchmark.build(name, images) for name in benchmark.MODELS)
    assert not vit.training and len(vit.layers) == 12 and vit.embed_dims == 384
    assert not resnet.training and resnet.depth == 50
    assert resnet.bn1.running_var.ne(1).all() and resnet.layer4[2].bn3.running_mean.ne(0).any()

"""The benchmarks: their clock, their memory and their statistics on known work, and a small run of each."""

import argparse
import importlib
import json
import operator
import pickle
import sys
import time

import pytest
import torch

from helpers import relative
from mmdenoiserep.core.utils.randomness import random_images
from mmdenoiserep.models.selective_scan import selective_scan
from studies import benchmark
from studies.benchmarks import (
    calibrate,
    cost,
    deployment,
    domain,
    fuse,
    growth,
    measure,
    profile,
    rank,
    reid_metric,
    start,
    vmamba,
)

SMALL = cost.Shape('mmpretrain::resnet/resnet18_8xb16_cifar10.py', (32, 32), 2)
MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Measures small models, and no memory in processes of their own, to which functions and arguments can be sent."""

    def in_this_process(function, *args, imports=()):
        function, args = pickle.loads(pickle.dumps((function, args)))
        return function(*args), 100.0

    peak_memory = measure.peak_memory
    monkeypatch.setattr(cost, 'SHAPES', {'small': SMALL})
    monkeypatch.setattr(cost, 'PROCESSES', 1)
    monkeypatch.setattr(profile, 'MODEL', 'small')
    monkeypatch.setattr(growth, 'IMAGES', (32, 64))
    monkeypatch.setattr(growth, 'BLOCKS', (1, 2))
    monkeypatch.setattr(vmamba, 'STAGES', ((2, 9),))
    monkeypatch.setattr(measure, 'peak_memory', lambda *args, **more: in_this_process(*args, **more)[1])
    return peak_memory


def test_functions_take_turns_in_an_order_that_reverses():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'abc'}
    seconds = measure.alternate(functions, warm_up=1, repeats=3)
    assert ''.join(calls) == 'abccbaabccba'
    assert {name: len(values) for name, values in seconds.items()} == dict(a=3, b=3, c=3)


@pytest.mark.parametrize('initialised', [True, False])
def test_work_on_a_gpu_is_waited_for(monkeypatch, initialised):
    events = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: initialised)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: events.append('wait'))
    clock = time.perf_counter
    monkeypatch.setattr(time, 'perf_counter', lambda: events.append('clock') or clock())
    measure.alternate({'work': lambda: events.append('work')}, warm_up=0, repeats=1)
    waited = ['wait', 'clock', 'work', 'wait', 'clock']
    assert events == (waited if initialised else ['clock', 'work', 'clock'])


def test_the_peak_of_memory(small):
    """What the function needed and let go of counts; its arguments, imports and what happened before do not."""
    assert small(operator.mul, b'x', 100 * MIB, imports=()) == pytest.approx(100, abs=10)
    assert small(len, b'x' * (200 * MIB), imports=()) < 10
    assert small(importlib.import_module, 'numpy', imports=('numpy',)) < 3
    with pytest.raises(ZeroDivisionError):
        small(operator.truediv, 1, 0, imports=())


def test_statistics():
    result = measure.cost_ratio([2.0, 9.0, 5.0, 8.0, 3.0], [1.0, 3.0, 5.0, 2.0, 1.0])
    assert tuple(result) == (2.0, 3.0, 3.0) and str(result) == '3.000 (2.000 to 3.000)'
    assert measure.exponent([1, 2, 4, 8], [3.0 * n**1.7 for n in (1, 2, 4, 8)]) == pytest.approx(1.7)


def test_a_denoised_step_is_a_training_step():
    for mode in ('joint', 'label_free'):
        each = cost.Run('small', 2, 'default rank', False)
        before = {key: value.clone() for key, value in each.model.named_parameters()}
        each.start(mode)
        each.step()
        graded = {key for key, p in each.model.named_parameters() if p in each.optimizer.optimizer.state}
        denoisers = {key for key in before if '.denoiser.' in key}
        assert graded == (set(before) if mode == 'joint' else denoisers)
        assert all(torch.equal(p, before[key]) for key, p in each.model.named_parameters())
        each.end()


def test_both_ways_of_the_metric_agree(monkeypatch):
    monkeypatch.setattr(reid_metric, 'MSMT17', (30, 50, 4))
    ours, theirs = (row['results'] for row in reid_metric.measure((100, 2000, 8), 1))
    assert ours == pytest.approx(theirs, abs=1e-6) and 0.01 < ours['mAP'] < ours['rank10'] < 1
    loops = reid_metric.rank_by_loops
    monkeypatch.setattr(reid_metric, 'rank_by_loops', lambda *case: dict(loops(*case), mINP=0.5))
    with pytest.raises(ValueError, match='mINP differs'):
        reid_metric.measure((20, 60, 4), 1)


new_onnxruntime = pytest.mark.skipif(
    sys.version_info < (3, 11), reason='onnxruntime 1.23, the last for Python 3.10, has no convolution of int8 weights'
)


@pytest.mark.parametrize(
    ('module', 'words', 'row'),
    [
        (calibrate, ['--size', 32, '--batch', 2, '--repeats', 1], '| ViT-S/16 | one in '),
        (domain, ['--size', 32, '--models', 'MobileNetV2', '--images', 64], '| MobileNetV2 | 64 | '),
        (cost, ['--models', 'small', '--repeats', 2], '| small | memory of a joint step |'),
        pytest.param(
            deployment,
            ['--models', 'resnet_fashion-mnist'],
            '| resnet_fashion-mnist | onnxruntime | ',
            marks=new_onnxruntime,
        ),
        (fuse, ['--sizes', 8, 17, 34, '--repeats', 1], '| 34 | '),
        (growth, ['--size', 32, '--width', 24, '--repeats', 1], 'images^'),
        (profile, ['--batch', 2, '--steps', 1, '--rows', 3], '| aten::'),
        (rank, ['--widths', 8, 24, '--vectors', 32, '--repeats', 1], '| 24 | '),
        (reid_metric, ['--size', 20, 40, 4], '| 20 x 40 x 4 | loops |'),
        (start, ['--repeats', 1], '| fuse_checkpoint.py |'),
        (vmamba, ['--size', 32, '--batch', 2, '--repeats', 3], '| 81 positions, 2 channels, forward'),
    ],
)
def test_small_runs(module, words, row, tmp_path):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    text, figures = module.run(parser.parse_args([*map(str, words)]))
    assert row in text
    if module is deployment:  # a fixed batch and torch.export are exact for all models
        (measured,) = figures['rows']
        assert len(measured['exports']) == 5 and max(measured['exports'].values()) < 1e-4
        assert set(measured['int8']) == {'torch', 'onnxruntime'}
    assert json.loads(json.dumps(figures, default=str))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, 'find_tools', lambda: [start.TOOLS / 'fuse_checkpoint.py'])
    page, file = tmp_path / 'a.md', tmp_path / 'a.json'
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'start', '--markdown', str(page), '--json', str(file)])
    benchmark.main()
    assert page.read_text() == capsys.readouterr().out
    content = json.loads(file.read_text())
    assert len(content['seconds']['fuse_checkpoint.py']) == 5
    for name in ('processor', 'cores', 'threads', 'torch', 'mmengine', 'mmdet'):
        assert any(name in key for key in content['machine']), name  # the fork has onedl-mmdetection
    assert set(benchmark.NAMES) >= {'reid_metric', 'cost', deployment.__name__.rpartition('.')[2]}


def test_the_loop_of_the_benchmark_is_the_scan():
    values = [value.detach().double() for value in vmamba.make_scan(3, 100)]
    assert relative(vmamba.scan_by_loop(*values), selective_scan(*values)) < 1e-10


@pytest.mark.parametrize(
    'quantiser', [deployment.by_torch, pytest.param(deployment.by_onnxruntime, marks=new_onnxruntime)]
)
@pytest.mark.parametrize(('strength', 'factor'), [(0.3, 1.6), (0.001, 1.2)])
def test_int8_costs_the_fused_model_what_it_costs_the_vanilla_one(quantiser, strength, factor):
    *models, shape = deployment.build_pair('vit_fashion-mnist', strength)
    with torch.no_grad():
        fused, vanilla = (quantiser(model, random_images((16, *shape), seed=16)) for model in models)
    assert fused['int8_bytes'] == vanilla['int8_bytes'] < 0.7 * fused['float32_bytes']
    assert 0 < vanilla['error'] < 0.05
    assert 1 / factor < fused['error'] / vanilla['error'] < factor


def test_a_failing_exporter_is_named():
    def fails(wide):
        raise NotImplementedError(wide)

    assert deployment.attempt(fails, True) == 'NotImplementedError'

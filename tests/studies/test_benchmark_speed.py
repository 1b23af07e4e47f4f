"""Tests of the benchmarks of speed and memory in tools/benchmarks, on small models."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT

sys.path.append(str(ROOT / 'tools'))

import benchmark  # noqa: E402
from benchmarks import cost, fuse, growth, measure, profile, rank, start  # noqa: E402
from mmdenoiserep.core import DEFAULT_RANK, DenoiseLayer, fuse_checkpoint  # noqa: E402

SMALL = cost.Shape('mmpretrain::resnet/resnet18_8xb16_cifar10.py', (32, 32), 2)


@pytest.fixture
def small(monkeypatch):
    """Measures a small ResNet, and no memory in processes of their own but what was asked to be run in them."""
    calls = []

    def peak_memory(function, *args, imports):
        calls.append(args)
        function(*args)
        return dict(plain=100.0)[args[2]] if args[2] == 'plain' else 105.0

    monkeypatch.setattr(cost, 'SHAPES', {'small': SMALL})
    monkeypatch.setattr(cost, 'PROCESSES', 1)
    monkeypatch.setattr(measure, 'peak_memory', peak_memory)
    return calls


def run(module, *words):
    """Returns what a benchmark returns for these options."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([*map(str, words)]))


def test_ratios_are_taken_pair_by_pair():
    result = measure.ratio([2.0, 9.0, 5.0, 8.0, 3.0], [1.0, 3.0, 5.0, 2.0, 1.0])
    assert tuple(result) == (2.0, 3.0, 3.0)
    assert str(result) == '3.000 (2.000 to 3.000)'
    assert tuple(measure.ratio([3.0], [2.0])) == (1.5, 1.5, 1.5)


def test_the_exponent_of_a_power_law():
    assert measure.exponent([1, 2, 4, 8], [3.0 * n**1.7 for n in (1, 2, 4, 8)]) == pytest.approx(1.7)


def test_the_cost_of_a_small_model(small):
    text, figures = run(cost, '--models', 'small', '--repeats', 2)
    (row,) = figures['rows']
    assert row['batch'] == 2 and set(row['measured']) == set(cost.GOALS)
    assert row['extra']['default rank'] < row['extra']['full rank'] < row['parameters']
    assert set(row['measured']['fused inference']) == {'plain', 'default rank'}
    for what, values in row['measured'].items():
        runs = 1 if what.startswith('memory') else 6 if what.endswith('inference') else 2
        assert all(len(times) == runs and min(times) > 0 for times in values.values())
    assert [args[2] for args in small] == ['plain', *cost.RANKS]
    line = next(line for line in text.splitlines() if 'memory of a joint step' in line)
    assert '| 100 MiB | 105 MiB | 1.050 (1.050 to 1.050) | met (at most 1.1) | 1.050' in line
    assert f'| small | {row["parameters"]:,} |' in text


def test_a_denoised_step_is_a_training_step(small):
    """The denoisers get gradients, in joint mode beside the model, and in label-free mode alone; nothing moves."""
    for mode in ('joint', 'label_free'):
        each = cost.Run('small', 2, 'default rank', False)
        before = {key: value.clone() for key, value in each.model.named_parameters()}
        each.start(mode)
        each.step()
        moments = each.optimizer.optimizer.state  # of those that had a gradient
        graded = {key for key, p in each.model.named_parameters() if p in moments}
        denoisers = {key for key in before if '.denoiser.' in key}
        assert graded == (set(before) if mode == 'joint' else denoisers)
        assert all(torch.equal(p, before[key]) for key, p in each.model.named_parameters())
        each.end()
        assert all(p.grad is None for p in each.model.parameters())


def test_a_detector_takes_its_step(monkeypatch):
    """On images and masks as mmdet's data loader gives them."""
    shape = cost.SHAPES['Mask R-CNN Swin-T']
    monkeypatch.setitem(cost.SHAPES, 'Mask R-CNN Swin-T', cost.Shape(shape.config, (64, 64), 1))
    each = cost.Run('Mask R-CNN Swin-T', 1, 'default rank', False)
    each.start('joint')
    each.step()
    moments = each.optimizer.optimizer.state
    assert all(moments[p]['exp_avg'].any() for key, p in each.model.named_parameters() if key.endswith('.denoiser.up'))


def test_fusing_files_of_three_sizes(tmp_path):
    text, figures = run(fuse, '--sizes', 8, 17, 34, '--repeats', 1, '--folder', tmp_path)
    assert not list(tmp_path.iterdir())
    assert [round(row['parameters'] / 1e6) for row in figures['rows']] == [9, 17, 34]
    assert all(1 < row['peak_mib'] / row['file_mib'] < 4 for row in figures['rows'])
    assert math.isfinite(figures['exponent']) and f'parameters^{figures["exponent"]:.2f}' in text


def test_the_generated_file_has_denoisers_of_the_default_rank(tmp_path):
    count = fuse.write_file(tmp_path / 'a.pth', 1)
    state = torch.load(tmp_path / 'a.pth')['state_dict']
    assert count == sum(value.numel() for value in state.values()) > 8e6
    assert state['blocks.0.fc2.denoiser.up'].shape == (1, 4096, DEFAULT_RANK)
    assert len(fuse_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.pth').layers) == 2


def test_the_growth_of_calibration(monkeypatch):
    monkeypatch.setattr(growth, 'IMAGES', (32, 64))
    monkeypatch.setattr(growth, 'WIDTHS', (48, 96))
    text, figures = run(growth, '--size', 32, '--layers', 1, '--repeats', 1)
    assert set(figures['seconds']) == {'48 32', '96 32', '96 64'}
    assert f'images^{figures["images"]:.2f}' in text and f'parameters^{figures["parameters"]:.2f}' in text


def test_steps_by_width_and_rank(monkeypatch):
    """Every way but the plain one takes the loss of four layers in each of its four steps."""
    losses, loss_of = [], DenoiseLayer.denoise_loss_of
    monkeypatch.setattr(DenoiseLayer, 'denoise_loss_of', lambda *args, **kw: losses.append(1) or loss_of(*args, **kw))
    text, figures = run(rank, '--widths', 8, 24, '--vectors', 32, '--repeats', 1)
    assert list(figures['widths']) == [8, 24] and all(len(ratios) == 4 for ratios in figures['widths'].values())
    assert '| 24 | ' in text
    assert len(losses) == 2 * 4 * 4 * 4


def test_every_program_shows_its_help():
    """``start`` finds all of them, and fails where one can't print its help."""
    tools = {path.name for path in start.find_tools()}
    assert {'train.py', 'test.py', 'fuse_checkpoint.py', 'calibrate.py', 'robustness.py', 'benchmark.py'} <= tools
    assert not {'common.py', 'measurement.py', 'study_report.py'} & tools
    text, figures = run(start, '--repeats', 1)
    assert set(figures['seconds']) == tools and all(f'| {name} |' in text for name in tools)


def test_where_the_time_goes(small, monkeypatch):
    monkeypatch.setattr(profile, 'MODEL', 'small')
    text, figures = run(profile, '--batch', 2, '--steps', 1, '--rows', 3)
    times = figures['milliseconds']
    assert 'aten::baddbmm_' in times['default rank'] and 'aten::baddbmm_' not in times['plain']
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    assert len(lines) == 1 + 3 + 2
    totals = [int(value.replace(',', '')) for value in lines[-1].split('|')[2:-1]]
    assert totals == [round(sum(values.values())) for values in times.values()]


def test_all_in_one_command(tmp_path, monkeypatch, capsys):
    """Every benchmark with its defaults; the report and the figures are written, with machine and versions."""
    monkeypatch.setattr(benchmark, 'NAMES', ['start'])
    monkeypatch.setattr(start, 'find_tools', lambda: [start.TOOLS / 'fuse_checkpoint.py'])
    page, file = tmp_path / 'all.md', tmp_path / 'all.json'
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'all', '--markdown', str(page), '--json', str(file)])
    benchmark.main()
    content = json.loads(file.read_text())
    assert len(content['start']['seconds']['fuse_checkpoint.py']) == 5
    assert page.read_text() == capsys.readouterr().out
    assert page.read_text().startswith('## How long every tool takes to print its help\n')
    assert {'processor', 'cores', 'threads', 'torch', 'mmengine', 'mmdet'} <= set(content['machine'])
    assert f'torch {torch.__version__},' in page.read_text()

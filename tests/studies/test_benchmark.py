"""Tests of tools/benchmark.py: its clock and its memory on known work, and small runs of the benchmarks."""

import importlib
import json
import operator
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / 'tools'))

import benchmark  # noqa: E402
from benchmarks import measure, reid_metric  # noqa: E402

MIB = 2**20


def main(*args):
    """Runs the tool in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['tools/benchmark.py', *map(str, args)])
        benchmark.main()


# Measuring


def test_functions_take_turns_in_an_order_that_reverses():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'abc'}
    seconds = measure.alternate(functions, warm_up=1, repeats=3)
    assert ''.join(calls) == 'abccbaabccba'
    assert {name: len(values) for name, values in seconds.items()} == dict(a=3, b=3, c=3)
    assert min(min(values) for values in seconds.values()) > 0


def test_seconds_are_those_of_the_function():
    seconds = measure.alternate({'short': lambda: None, 'long': lambda: time.sleep(0.05)}, warm_up=0, repeats=3)
    assert min(seconds['long']) >= 0.05 > min(seconds['short'])


@pytest.mark.parametrize('initialised', [True, False])
def test_work_on_a_gpu_is_waited_for(monkeypatch, initialised):
    """Before the clock starts and before it stops, but only where CUDA is in use."""
    events = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: initialised)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: events.append('wait'))
    clock = time.perf_counter
    monkeypatch.setattr(time, 'perf_counter', lambda: events.append('clock') or clock())
    measure.alternate({'work': lambda: events.append('work')}, warm_up=0, repeats=1)
    waited = ['wait', 'clock', 'work', 'wait', 'clock']
    assert events == (waited if initialised else ['clock', 'work', 'clock'])


def test_the_peak_of_memory():
    """What the function needed and let go of counts; its arguments and what happened before do not."""
    ballast = b'x' * (200 * MIB)
    assert measure.peak_memory(operator.mul, b'x', 100 * MIB, imports=()) == pytest.approx(100, abs=10)
    assert measure.peak_memory(len, ballast, imports=()) < 10


def test_imports_do_not_count():
    """Unless the function does them."""
    assert measure.peak_memory(importlib.import_module, 'numpy', imports=('numpy',)) < 3
    assert measure.peak_memory(importlib.import_module, 'numpy', imports=()) > 6


def test_an_error_of_the_measured_function_comes_through():
    with pytest.raises(ZeroDivisionError):
        measure.peak_memory(operator.truediv, 1, 0, imports=())


@pytest.mark.parametrize('broken', ['write_text', 'read_text'])
def test_a_system_that_does_not_tell_says_so(monkeypatch, broken):
    """Without /proc/self/clear_refs, or without the fields in /proc/self/status."""

    def denied(*args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, broken, denied if broken == 'write_text' else lambda path: 'Name:\tpython\n')
    call = measure.pickle.dumps((len, ((),)))
    with pytest.raises(RuntimeError, match='peak memory needs (Linux with|VmRSS in)'):
        measure._growth(call, ())


# The benchmark of the metric


def test_both_ways_agree_and_are_reported(tmp_path, capsys):
    file = tmp_path / 'figures.json'
    main('reid-metric', '--size', 100, 2000, 8, '--repeats', 2, '--json', file)
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    ours, loops = content['rows']
    assert (ours['way'], loops['way']) == ('ours', 'loops') and ours['size'] == loops['size'] == [100, 2000, 8]
    assert len(ours['seconds']) == len(loops['seconds']) == 2
    assert ours['results'] == pytest.approx(loops['results'], abs=1e-6)
    assert 0.01 < ours['results']['mAP'] < ours['results']['rank10'] < 1
    assert 1 < ours['peak_mib'] < 50 and 1 < loops['peak_mib'] < 50  # 200,000 distances need 0.8 MiB
    assert f'| 100 x 2,000 x 8 | ours | {np.median(ours["seconds"]):.1f} | {ours["peak_mib"]:,.0f} MiB |' in printed
    assert f'torch {torch.__version__}' in printed and content['machine']['threads'] == torch.get_num_threads()


def test_ours_alone_at_the_large_size(capsys, monkeypatch):
    monkeypatch.setattr(reid_metric, 'MSMT17', (30, 50, 4))
    monkeypatch.setattr(measure, 'peak_memory', lambda *args, **options: 1234.5)
    main('reid-metric', '--size', 20, 40, 4, '--msmt17')
    rows = [line for line in capsys.readouterr().out.splitlines() if ' x ' in line][1:]
    assert [row.split(' | ')[:2] for row in rows] == [
        ['| 20 x 40 x 4', 'ours'],
        ['| 20 x 40 x 4', 'loops'],
        ['| 30 x 50 x 4', 'ours'],
    ]
    assert all('| 1,234 MiB |' in row for row in rows)


def test_ways_that_disagree_are_an_error(monkeypatch):
    loops = reid_metric.rank_by_loops
    monkeypatch.setattr(reid_metric, 'rank_by_loops', lambda *case: dict(loops(*case), mINP=0.5))
    with pytest.raises(ValueError, match='mINP differs'):
        reid_metric.measure((20, 60, 4), 1)


def test_made_up_identities_are_like_those_of_market():
    *features, query_pids, gallery_pids, query_camids, gallery_camids = reid_metric.make_case(3368, 15913, 2)
    assert [x.shape for x in features] == [(3368, 2), (15913, 2)] and features[0].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features[1], axis=1), 1, rtol=1e-5)
    assert query_pids.min() == 1 and query_pids.max() == gallery_pids.max() == 750
    assert abs((gallery_pids == 0).sum() - 2793) < 200
    assert set(query_camids) == set(gallery_camids) == set(range(6))


# The command


def test_help_is_shown_at_once():
    """Of the tool and of every benchmark, without importing torch."""
    assert 'reid_metric' in benchmark.NAMES and 'measure' not in benchmark.NAMES
    for name in ([], *([name.replace('_', '-')] for name in benchmark.NAMES)):
        command = [sys.executable, '-X', 'importtime', ROOT / 'tools/benchmark.py', *name, '--help']
        result = subprocess.run(command, text=True, capture_output=True, timeout=60)
        assert result.returncode == 0, result.stderr[-2000:]
        assert ('--json' if name else 'reid-metric') in result.stdout
        imported = re.findall(r'[| ](\w+)$', result.stderr, re.MULTILINE)
        assert 'argparse' in imported and not {'torch', 'mmengine'} & set(imported)


def test_a_json_file_that_can_not_be_written():
    for file, text in (('figures.txt', 'must end with .json'), ('none/figures.json', 'the folder none does not exist')):
        with pytest.raises(SystemExit, match=f'benchmark: .*{text}'):
            main('reid-metric', '--json', file)

"""What allow_training_checkpoints lets through weights_only, and what it does not."""

import importlib
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import initialize
from mmengine.runner import CheckpointLoader, load_checkpoint

from engine_helpers import inner, make_runner, snapshot, tiny_model
from helpers import write_safetensors
from mmdenoiserep.core import InputError
from mmdenoiserep.engine.resume import allow_training_checkpoints

pytestmark = pytest.mark.usefixtures('clean_allow_list')

JOINT = dict(type='DenoiseLossHook')
SCHEDULE = dict(type='CosineAnnealingLR', by_epoch=False, T_max=4)


@pytest.fixture
def checkpoint(case):
    """A training checkpoint of mmengine, with optimizer, schedule and message hub."""
    saving = dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False))
    runner = make_runner(case, tiny_model(), [JOINT], iterations=2, default_hooks=saving, param_scheduler=SCHEDULE)
    runner.train()
    return Path(runner.work_dir, 'iter_2.pth'), runner


def test_training_checkpoint_loads_under_weights_only(checkpoint):
    """It is refused before and read after, with the histories of the log as they were."""
    path, runner = checkpoint
    with pytest.raises(pickle.UnpicklingError, match='HistoryBuffer'):
        torch.load(path, weights_only=True)
    allow_training_checkpoints()
    content = torch.load(path, weights_only=True)
    assert {'state_dict', 'optimizer', 'param_schedulers', 'message_hub', 'meta'} <= set(content)
    history = content['message_hub']['log_scalars']['train/loss_denoise']
    assert isinstance(history, HistoryBuffer)
    values, counts = history.data
    expected, _ = runner.message_hub.log_scalars['train/loss_denoise'].data
    assert values.tolist() == expected.tolist()
    assert len(values) == 2 and counts.tolist() == [1, 1]
    assert history.mean() == pytest.approx(values.mean())
    assert history.statistics('max', 2) == values.max()
    statistics = {name: getattr(HistoryBuffer, name) for name in ('min', 'max', 'current', 'mean')}
    assert dict(history._statistics_methods) == statistics


def test_runner_resumes(checkpoint, case):
    path, first = checkpoint
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    resume = dict(load_from=str(path), resume=True)
    runner = make_runner(case, tiny_model(), [JOINT], iterations=3, param_scheduler=SCHEDULE, **resume)
    allow_training_checkpoints()
    runner.train()
    assert runner.iter == 3
    assert len(runner.optim_wrapper.gradients) == 1
    assert snapshot(inner(runner)).keys() == snapshot(inner(first)).keys()


def test_file_written_with_numpy_1(checkpoint, tmp_path):
    path, _ = checkpoint
    old = tmp_path / 'old.pth'
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, 'w') as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith('data.pkl'):
                assert b'numpy._core.multiarray' in content
                content = content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
            target.writestr(entry.filename, content)
    allow_training_checkpoints()
    content = torch.load(old, weights_only=True)
    assert len(content['message_hub']['log_scalars']['train/loss'].data[0]) == 2


class Reduce:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    'attack',
    [
        lambda marker: Reduce(os.system, f'touch {marker}'),
        lambda marker: Reduce(eval, f'open({str(marker)!r}, "w")'),
        lambda marker: Reduce(getattr, HistoryBuffer, '__init__'),
        lambda marker: Reduce(getattr, HistoryBuffer, '__subclasses__'),
        lambda marker: Reduce(getattr, HistoryBuffer, 'update'),
        lambda marker: Reduce(getattr, np.ndarray, 'tofile'),
        lambda marker: Reduce(getattr, Reduce(getattr, HistoryBuffer, 'mean'), '__globals__'),
        lambda marker: Reduce(np.load, str(marker)),
        lambda marker: Reduce(HistoryBuffer, Reduce(os.mkdir, str(marker)), []),
    ],
    ids=['system', 'eval', 'init', 'subclasses', 'method', 'ndarray', 'globals', 'numpy', 'nested'],
)
def test_malicious_files_are_refused_and_do_not_run(attack, tmp_path):
    """Neither foreign functions nor attributes other than the four statistics get through."""
    marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
    torch.save(dict(state_dict={}, message_hub=attack(marker)), path)
    allow_training_checkpoints()
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        torch.load(path, weights_only=True)
    assert not marker.exists()


def test_the_attack_would_run_without_weights_only(tmp_path):
    """The counter-proof: the same file does run its code where pickles are trusted."""
    marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
    torch.save(dict(message_hub=Reduce(os.system, f'touch {marker}')), path)
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_numpy_before_its_module_was_renamed(checkpoint, monkeypatch):
    """numpy below 1.26 has no numpy._core, and no list of dtypes: neither is asked for."""
    path, _ = checkpoint
    monkeypatch.setitem(sys.modules, 'numpy._core', None)
    monkeypatch.delattr(np, 'dtypes')
    with pytest.raises(ImportError):
        importlib.import_module('numpy._core')
    importlib.reload(sys.modules[allow_training_checkpoints.__module__]).allow_training_checkpoints()
    history = torch.load(path, weights_only=True)['message_hub']['log_scalars']['train/loss_denoise']
    assert len(history.data[0]) == 2


@pytest.mark.parametrize('write', [write_safetensors, lambda path, state: torch.save(state, path)])
def test_mmengine_reads_what_the_tools_read(write, tmp_path):
    state = {'weight': torch.randn(2, 3), 'bias': torch.randn(2)}
    write(tmp_path / 'weights.bin', state)
    allow_training_checkpoints()
    model = torch.nn.Linear(3, 2)
    initialize(model, dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.bin')))
    assert torch.equal(model.weight, state['weight']) and torch.equal(model.bias, state['bias'])


def test_what_mmengine_cannot_read_is_named(tmp_path):
    path = tmp_path / 'weights.bin'
    path.write_text('<html>Sign in</html>')
    allow_training_checkpoints()
    with pytest.raises(InputError, match='is a web page'):
        load_checkpoint(torch.nn.Linear(3, 2), str(path))


class Mine:
    """A class of the user."""


def test_objects_that_the_user_allows(tmp_path):
    path = tmp_path / 'in.pth'
    torch.save(dict(state_dict={}, mine=Mine()), path)
    allow_training_checkpoints()
    with pytest.raises(InputError, match='Mine'):
        CheckpointLoader.load_checkpoint(str(path))
    torch.serialization.add_safe_globals([Mine])
    assert type(CheckpointLoader.load_checkpoint(str(path))['mine']) is Mine

"""Reading, fusing and writing checkpoint files."""

import copy
import errno
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from helpers import ROOT, equal, randomise, signature
from mmdenoiserep import apply_denoiserep, fuse_checkpoint, fuse_model, fuse_state_dict
from mmdenoiserep.core import CheckpointError, read_checkpoint

META = {'epoch': 3, 'iter': 40, 'dataset_meta': {'classes': ('a', 'b'), 'palette': [[1, 2, 3]]}, 'seed': None}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))


def build_denoised(rank=None):
    model = build()
    apply_denoiserep(model, 'all', rank=rank, example_input=torch.zeros(1, 3, 3, 3))
    return randomise(model)


def training_checkpoint(model):
    """What mmengine saves during training: optimizer, schedulers, and a message hub with numpy inside."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    hub = MessageHub(f'hub{id(model)}')
    for value in (1.0, torch.tensor(2.0)):
        hub.update_scalar('train/loss', value, 2)
    hub.update_info('epoch', 3)
    return {
        'meta': META,
        'state_dict': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'message_hub': hub.state_dict(),
        'param_schedulers': [{'base_values': [0.1], 'last_step': 3}],
    }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / 'epoch_3.pth'
    torch.save(training_checkpoint(build_denoised()), path)
    return path


@pytest.fixture
def target(tmp_path):
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out' / 'fused.pth'


def save(path, content):
    torch.save(content, path)
    return path


def refused(source, target, message, **options):
    """Fuse, expecting one sentence; nothing may be written and the input may not change."""
    before = source.read_bytes() if source.is_file() else None
    folder = sorted(target.parent.iterdir()) if target.parent.is_dir() else None
    with pytest.raises(CheckpointError, match=message) as caught:
        fuse_checkpoint(source, target, **options)
    assert '\n' not in str(caught.value)
    assert str(source) in str(caught.value) or str(target.parent) in str(caught.value)
    assert before is None or source.read_bytes() == before
    assert folder is None or sorted(target.parent.iterdir()) == folder


def test_training_checkpoint_is_read_safely(source, clean_allow_list):
    """Tensors and plain data come back; mmengine's and numpy's objects are inert; the process' allow-list stays."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(source, weights_only=True)
    allowed = set(torch.serialization.get_safe_globals())
    checkpoint = read_checkpoint(source)
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert checkpoint['meta'] == META
    expected = torch.load(source, weights_only=False)
    assert equal(checkpoint['state_dict'], expected['state_dict'])
    assert type(expected['message_hub']['log_scalars']['train/loss']).__name__ == 'HistoryBuffer'
    assert type(checkpoint['message_hub']['log_scalars']['train/loss']).__name__ == 'Inert'


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('rank', [None, 2])
def test_fused_file(tmp_path, target, rank, zipped):
    """The output holds `meta` and `state_dict` with exactly the vanilla keys, shapes and dtypes, and fused values."""
    model = build_denoised(rank)
    source = tmp_path / 'in.pth'
    torch.save(training_checkpoint(model), source, _use_new_zipfile_serialization=zipped)
    before = source.read_bytes()
    result = fuse_checkpoint(source, target)
    assert source.read_bytes() == before
    assert os.listdir(target.parent) == ['fused.pth']
    fused = torch.load(target, weights_only=True)
    assert set(fused) == {'meta', 'state_dict'}
    assert fused['meta'] == {**META, 'denoiserep': {'fused': True, 'layers': 2}}
    state, vanilla, expected = fused['state_dict'], build().state_dict(), fuse_model(model).state_dict()
    assert signature(state) == signature(vanilla) and equal(state, expected)
    assert state._metadata == vanilla._metadata
    assert set(result.layers) == {'0', '4'}
    assert all(0.05 < change < 2 for change in result.layers.values())
    assert result.notes == ()
    assert '2 layers fused' in str(result)


def test_two_fusions_are_the_same_bytes(source, target):
    fuse_checkpoint(source, target)
    other = target.parent / 'another_name_that_is_longer.pth'
    fuse_checkpoint(source, other)
    assert target.read_bytes() == other.read_bytes()
    fuse_checkpoint(source, target, overwrite=True)
    assert target.read_bytes() == other.read_bytes()


def test_loads_without_this_package(source, target):
    """The fused file strict-loads where mmdenoiserep and mmengine do not exist; the core works without mmengine."""
    fuse_checkpoint(source, target)
    loads = f"""
import sys
sys.modules['mmdenoiserep'] = sys.modules['mmengine'] = sys.modules['mmcv'] = None
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
print(model.load_state_dict(torch.load({str(target)!r}, weights_only=True)['state_dict'], strict=True))
del sys.modules['mmdenoiserep']
sys.path.insert(0, {str(ROOT)!r})
import mmdenoiserep
mmdenoiserep.fuse_checkpoint({str(source)!r}, {str(target)!r}, overwrite=True)
print('core works:', not any(name.startswith(('mmengine.', 'mmcv.')) for name in sys.modules))
"""
    run = subprocess.run([sys.executable, '-c', loads], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == ['<All keys matched successfully>', 'core works: True'], run.stderr


@pytest.mark.parametrize('wrap', [lambda state: state, lambda state: {'state_dict': state}], ids=['bare', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_prefixes_are_stripped(tmp_path, target, prefix, wrap):
    """Those of DDP and torch.compile, and the result says so; the file may be the state dict itself."""
    state = build_denoised().state_dict()
    content = wrap({prefix + key: value for key, value in state.items()})
    result = fuse_checkpoint(save(tmp_path / 'in.pth', content), target)
    fused = torch.load(target)['state_dict']
    assert equal(fused, fuse_state_dict(state))
    build().load_state_dict(fused, strict=True)
    assert {note.split()[1] for note in result.notes} == {f'{part}.' for part in prefix.split('.') if part}
    assert all(note.startswith('stripped ') and f'note: {note}' in str(result) for note in result.notes)


def test_ema_is_mentioned(tmp_path, target):
    averaged, current = build_denoised(), randomise(build_denoised(), seed=5)
    content = {'state_dict': averaged.state_dict(), 'ema_state_dict': current.state_dict()}
    result = fuse_checkpoint(save(tmp_path / 'in.pth', content), target)
    assert any('EMA' in note for note in result.notes)
    assert torch.equal(torch.load(target)['state_dict']['4.weight'], fuse_model(averaged)[4].weight)


@pytest.mark.parametrize('size, noted', [(1e-5, True), (0.3, False)])
def test_half_precision_is_mentioned(tmp_path, target, size, noted):
    """A correction below the rounding of bfloat16 changes nothing, and the result says so; a larger one does."""
    model = randomise(build_denoised(), size).bfloat16()
    result = fuse_checkpoint(save(tmp_path / 'in.pth', {'state_dict': model.state_dict()}), target)
    assert any('2 of 2 weights are stored in half precision and did not change' in n for n in result.notes) == noted
    assert torch.load(target)['state_dict']['4.weight'].dtype == torch.bfloat16
    changed = not torch.equal(torch.load(target)['state_dict']['4.weight'], model[4].weight)
    assert changed != noted


def history():
    hub = MessageHub('history')
    hub.update_scalar('loss', 1.0)
    return hub.state_dict()['log_scalars']['loss']


@pytest.mark.parametrize(
    'more, left_out',
    [
        ({'scale': history(), 'sparse': torch.eye(2).to_sparse()}, 'scale, sparse'),
        ({1: 'one', history(): 'history', 'zero': torch.zeros(1).to_sparse()}, 'keys that are no text, zero'),
    ],
    ids=['values', 'keys'],
)
def test_meta_that_is_no_plain_data_is_left_out(tmp_path, target, more, left_out):
    content = {'meta': META | more, 'state_dict': build_denoised().state_dict()}
    result = fuse_checkpoint(save(tmp_path / 'in.pth', content), target)
    assert set(torch.load(target, weights_only=True)['meta']) == {*META, 'denoiserep'}
    assert result.notes == (f'left out of meta, because it is no plain data: {left_out}',)


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(source, target, umask):
    before = os.umask(umask)
    try:
        fuse_checkpoint(source, target)
    finally:
        assert os.umask(before) == umask
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_unreadable_file(source, target, monkeypatch):
    monkeypatch.setattr(torch, 'load', failing(OSError(errno.EIO, os.strerror(errno.EIO))))
    refused(source, target, f'epoch_3.pth cannot be read: {os.strerror(errno.EIO)}')


def test_missing_file_and_folder(tmp_path, target):
    refused(tmp_path / 'no.pth', target, 'no.pth does not exist')
    refused(tmp_path, target, 'is not a file')


@pytest.mark.parametrize('part', [0.0, 0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_truncated_file(tmp_path, target, source, part, zipped):
    path = tmp_path / 'part.pth'
    torch.save(torch.load(source, weights_only=False), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    refused(path, target, 'part.pth is empty' if not part else 'part.pth is truncated or no PyTorch checkpoint')


@pytest.mark.parametrize('seed', range(4))
def test_random_bytes(tmp_path, target, seed):
    path = tmp_path / 'noise.pth'
    noise = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path.write_bytes((b'', b'PK\3\4', b'\x80\2', b'{"a": 1}')[seed] + noise.numpy().tobytes())
    refused(path, target, 'noise.pth is truncated or no PyTorch checkpoint')


class Payload:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('place', ['meta', 'message_hub'])
def test_file_that_needs_code(tmp_path, target, place, zipped):
    proof = tmp_path / 'proof'
    for function, name in ((os.system, 'posix.system'), (shutil.copy, 'shutil.copy')):
        arguments = (f'touch {proof}',) if function is os.system else (__file__, str(proof))
        path = tmp_path / f'{name}.pth'
        content = {'state_dict': build_denoised().state_dict(), place: {'a': Payload(function, *arguments)}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refused(path, target, rf'running code that it brings \({name}\); if you trust .* --allow-pickle')
        assert not proof.exists()
    fuse_checkpoint(path, target, allow_pickle=True)
    assert proof.exists()


def test_getattr_is_inert(tmp_path):
    """The getattr that training checkpoints name is never the real one."""
    attribute = Payload(getattr, 'x', 'join')
    path = save(tmp_path / 'in.pth', {'state_dict': build_denoised().state_dict(), 'x': attribute})
    assert type(read_checkpoint(path)['x']).__name__ == 'Inert'
    assert callable(read_checkpoint(path, allow_pickle=True)['x'])


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'4.denoiser.weight': torch.full((1, 8, 8), torch.nan)}, r'4\.denoiser\.weight holds NaN or Inf'),
        ({'0.denoiser.weight': torch.zeros(3, 3, 3)}, 'does not fit its weight'),
        ({'4.denoiser.weight': None, '4.denoiser.up': torch.zeros(1, 8, 2)}, 'the denoiser of 4 is incomplete'),
        ({'4.bias': [1, 2]}, 'holds no tensor'),
    ],
)
def test_state_dicts_that_do_not_fit(tmp_path, target, changes, message):
    """The errors of fuse_state_dict, which test_fuse.py lists, and what only a file can hold."""
    state = {key: value for key, value in (build_denoised().state_dict() | changes).items() if value is not None}
    refused(save(tmp_path / 'in.pth', {'state_dict': state}), target, message)


@pytest.mark.parametrize(
    'content, message',
    [
        ({'state_dict': build().state_dict()}, 'there is no denoiser in it'),
        (build().state_dict(), 'there is no denoiser in it'),
        ([1, 2], 'holds a list, not a checkpoint'),
        (torch.zeros(2), 'holds a Tensor, not a checkpoint'),
        ({}, 'has no state_dict'),
        ({'state_dict': {}}, 'has no state_dict'),
        ({'state_dict': [1]}, 'has no state_dict'),
        ({'state_dict': {1: torch.zeros(2)}}, 'has no state_dict'),
        ({'model': {'a': torch.zeros(2)}}, 'there is no denoiser in it'),
        ({'epoch': 3, 'args': {'lr': 0.1}}, 'it has epoch, args'),
    ],
)
def test_files_without_denoisers(tmp_path, target, content, message):
    refused(save(tmp_path / 'in.pth', content), target, message)


def test_already_fused(source, target):
    fuse_checkpoint(source, target)
    refused(target, target.parent / 'again.pth', 'is fused already')


def test_output_paths(source, target, tmp_path):
    """An output that exists, is a folder, has no folder, or is the input, directly or through links."""
    target.write_text('keep me')
    refused(source, target, 'exists; name another file, or pass --overwrite')
    assert target.read_text() == 'keep me'
    refused(source, target.parent, 'is a folder; name the file')
    refused(source, target.parent, 'is a folder; name the file', overwrite=True)
    refused(source, tmp_path / 'nowhere' / 'out.pth', 'the folder .*nowhere does not exist')
    symbolic, hard = tmp_path / 'symbolic.pth', tmp_path / 'hard.pth'
    symbolic.symlink_to(source)
    hard.hardlink_to(source)
    for same in (source, symbolic, hard):
        refused(source, same, 'is the input itself', overwrite=True)
    fuse_checkpoint(source, target, overwrite=True)
    assert torch.load(target)['meta']['denoiserep']['fused']


def failing(error):

    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    'owner, name, code',
    [
        (tempfile, 'mkstemp', errno.EROFS),
        (tempfile, 'mkstemp', errno.EACCES),
        (os, 'fsync', errno.ENOSPC),
        (os, 'replace', errno.EROFS),
        (torch, 'save', errno.ENOSPC),
    ],
)
def test_disk_that_refuses(source, target, monkeypatch, owner, name, code):
    """A read-only or full disk, at any moment: one sentence with the reason, and nothing left behind."""
    monkeypatch.setattr(owner, name, failing(OSError(code, os.strerror(code))))
    refused(source, target, f'cannot be written: {os.strerror(code)}')
    target.write_text('keep me')
    refused(source, target, f'cannot be written: {os.strerror(code)}', overwrite=True)
    assert target.read_text() == 'keep me'


def test_folder_that_takes_no_files(source):
    refused(source, Path('/proc/self/fdinfo/fused.pth'), 'cannot be written')


def test_full_disk(tmp_path, source, target):
    """The writer is stopped for real, by a limit of the file size in another process."""
    state = build_denoised().state_dict()
    big = save(tmp_path / 'big.pth', {'state_dict': {**state, 'other': torch.zeros(300_000)}})
    code = f"""
import resource, signal, sys
sys.modules['mmengine'] = None
from mmdenoiserep.core import CheckpointError, fuse_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    fuse_checkpoint({str(big)!r}, {str(target)!r})
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""
    before = big.read_bytes()
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 3, run.stderr
    assert run.stdout.startswith(f'{target} cannot be written: ')
    assert run.stdout.count('\n') == 1
    assert not list(target.parent.iterdir())
    assert big.read_bytes() == before


@pytest.mark.parametrize('moment', ['during torch.save', 'before the rename'])
def test_interrupt(source, target, monkeypatch, moment):
    """Ctrl-C while writing passes on, leaves nothing behind, and the input and an older output untouched."""
    if moment == 'during torch.save':
        calls = []
        monkeypatch.setattr(torch.serialization, '_save', interrupt_after(torch.serialization._save, calls))
    else:
        calls = [1]
        monkeypatch.setattr(os, 'replace', failing(KeyboardInterrupt()))
    before = source.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(source, target)
    assert calls
    assert not list(target.parent.iterdir())
    target.write_text('keep me')
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(source, target, overwrite=True)
    assert target.read_text() == 'keep me'
    assert os.listdir(target.parent) == [target.name]
    assert source.read_bytes() == before


def interrupt_after(save, calls):

    def interrupted(content, file, *args, **kwargs):
        save({'part': copy.copy(content['meta'])}, file, *args, **kwargs)
        calls.append(1)
        raise KeyboardInterrupt

    return interrupted

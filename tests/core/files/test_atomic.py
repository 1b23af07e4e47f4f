"""Writers that are killed, interrupted or two at once leave whole files."""

import os
import random
import signal
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdenoiserep.core import CheckpointError, Moments, fuse_checkpoint, load_moments, save_moments
from mmdenoiserep.core.files.atomic import write_file, write_folder
from mmdenoiserep.core.files.checkpoint import write_atomically

KILLS = 50
"""Writers of each kind that are killed."""


def denoised_state(number, size=100):
    """A state dict with a Linear layer and its denoiser."""
    weight = torch.full((size, size), float(number))
    return {'fc.weight': weight, 'fc.denoiser.weight': torch.zeros(1, size, size)}


def write_fused(path, number):
    fuse_checkpoint(path.parent / f'in{number}.pth', path, overwrite=True)


def write_checkpoint(path, number):
    write_atomically(dict(meta={}, state_dict={'fc.weight': torch.full((100, 100), float(number))}), path)


def read_weight(path):
    return only(torch.load(path, weights_only=True)['state_dict']['fc.weight'].numpy())


def write_moments(path, number):
    save_moments({'fc': Moments.of(torch.eye(200)[None] + number)}, path, {})


def read_moments(path):
    return round(load_moments(path)[0]['fc'].mean.mean().item())


def write_features(path, number):
    with write_file(path) as file:
        np.savez(file, features=np.full(20_000, number))


def read_features(path):
    with np.load(path) as content:
        return only(content['features'])


def only(values):
    """Returns the one value that all are."""
    (value,) = np.unique(values)
    return value


WRITERS = dict(
    fused=(write_fused, read_weight),
    checkpoint=(write_checkpoint, read_weight),
    moments=(write_moments, read_moments),
    features=(write_features, read_features),
)


@pytest.fixture
def folder(tmp_path):
    """A folder for the output, with links to the inputs of the writers."""
    (tmp_path / 'out').mkdir()
    for number in (0, 1):
        torch.save(dict(state_dict=denoised_state(number)), tmp_path / f'in{number}.pth')
        (tmp_path / f'out/in{number}.pth').symlink_to(tmp_path / f'in{number}.pth')
    return tmp_path / 'out'


def fork(action):
    """Starts an action in a copy of this process, which has torch loaded; returns its process id once it begins."""
    begun, begin = os.pipe()
    if pid := os.fork():
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        return pid
    code = 1
    try:
        os.write(begin, b'.')
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def left_over(folder, target):
    """Returns what is in the folder besides the target and the inputs."""
    return [path for path in folder.iterdir() if path != target and not path.is_symlink()]


@pytest.mark.parametrize('name', WRITERS)
def test_kill_9_leaves_the_old_or_the_new_file(name, folder):
    write, read = WRITERS[name]
    target = folder / 'out.xyz'
    write(target, 0)
    started = time.perf_counter()
    for number in (1, 0, 1, 0):
        assert os.waitpid(fork(lambda number=number: write(target, number)), 0)[1] == 0
    longest = (time.perf_counter() - started) / 4
    draw = random.Random(0)
    killed = replaced = 0
    for _ in range(10 * KILLS):
        before = read(target)
        pid = fork(lambda number=1 - before: write(target, int(number)))
        time.sleep(draw.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        after = read(target)
        assert after in (before, 1 - before)
        longest *= 1.05 if os.WIFSIGNALED(status) else 0.9  # as fast as the machine now is, half of them are killed
        if not os.WIFSIGNALED(status):
            assert status == 0 and after == 1 - before
            continue
        killed += 1
        replaced += after != before
        if killed == KILLS:
            break
    assert killed == KILLS
    assert replaced < KILLS
    parts = left_over(folder, target)
    assert parts, 'some were killed in the middle of writing'
    assert all(path.name.startswith('.') and path.suffix == '.part' for path in parts)
    for number in (0, 1):
        write(target, number)
        assert read(target) == number
    assert left_over(folder, target) == parts


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_replaced_stays(error, tmp_path, monkeypatch):
    target = tmp_path / 'out'
    target.mkdir()
    (target / 'old.txt').touch()
    rename = Path.rename

    def fail(path, to):
        if path.name == 'new':
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, 'rename', fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)), write_folder(target) as new:
        (new / 'new.txt').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['out', 'old.txt']


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / 'a.txt'
    with write_file(target) as file:
        file.write(b'first')
        assert not target.exists()
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, 'No space left'), CheckpointError)):
        with pytest.raises(raised), write_file(target) as file:
            file.write(b'second')
            raise error
    assert target.read_text() == 'first' and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize('name', WRITERS)
def test_two_writers_at_once(name, folder):
    write, read = WRITERS[name]
    target = folder / 'out.xyz'
    for _ in range(5):
        pids = [fork(lambda number=number: [write(target, number) for _ in range(4)]) for number in (0, 1)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
        assert read(target) in (0, 1)
        assert not left_over(folder, target)


@pytest.mark.slow
def test_more_than_two_gibibytes(tmp_path):
    state = dict(other=torch.zeros(2**29 + 1000), **denoised_state(3, size=8))
    state['fc.denoiser.weight'] += 0.5 * torch.eye(8)
    torch.save(dict(state_dict=state), tmp_path / 'in.pth')
    fuse_checkpoint(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert (tmp_path / 'out.pth').stat().st_size > 2**31
    fused = torch.load(tmp_path / 'out.pth', weights_only=True, mmap=True)['state_dict']
    assert fused['other'].shape == state['other'].shape
    assert torch.equal(fused['fc.weight'], torch.full((8, 8), 1.5))

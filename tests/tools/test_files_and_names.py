"""Files under harm: killed writers, two writers at once, disks that take nothing, odd names, links, over 2 GiB."""

import os
import random
import signal
import subprocess
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from hardening_helpers import Command, commands, contents, make_small, read_checkpoint, run
from mmdenoiserep.core import CheckpointError, Moments, fuse_checkpoint, load_moments, save_moments
from mmdenoiserep.core.files.atomic import write_file, write_folder
from mmdenoiserep.core.files.checkpoint import write_atomically

KILLS = 50
"""Writers of each kind that are killed."""


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A small model with its files."""
    return make_small(tmp_path_factory.mktemp('small'))


# Writers of a content that is known by its number, 0 or 1, and readers that return the number of a whole content


def denoised_state(number, size=100):
    """A state dict with a Linear layer and its denoiser."""
    weight = torch.full((size, size), float(number))
    return {'fc.weight': weight, 'fc.denoiser.weight': torch.zeros(1, size, size)}


def write_fused(path, number):
    fuse_checkpoint(path.parent / f'in{number}.pth', path, overwrite=True)


def write_checkpoint(path, number):
    write_atomically(dict(meta={}, state_dict={'fc.weight': denoised_state(number)['fc.weight']}), path)


def read_weight(path):
    return only(torch.load(path, weights_only=True)['state_dict']['fc.weight'].numpy())


def write_moments(path, number):
    moments = Moments.of(torch.eye(200)[None] + number)
    save_moments({'fc': moments}, path, {})


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
    """A folder with the inputs of the writers."""
    for number in (0, 1):
        torch.save(dict(state_dict=denoised_state(number)), tmp_path / f'in{number}.pth')
    (tmp_path / 'out').mkdir()
    for number in (0, 1):
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
    """A killed writer may leave a hidden ``.part`` file, never a broken one under the final name."""
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
    """What goes wrong between the two renames, an interrupt too, brings the old folder back."""
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
    """Both end well, and the file is that of one of them."""
    write, read = WRITERS[name]
    target = folder / 'out.xyz'
    for _ in range(5):
        pids = [fork(lambda number=number: [write(target, number) for _ in range(4)]) for number in (0, 1)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
        assert read(target) in (0, 1)
        assert not left_over(folder, target)


# Disks and folders that take nothing


def all_commands(small, out):
    """Returns a command for every tool that writes."""
    vit = {name: torch.ones(2) for name in ('cls_token', 'pos_embed', 'patch_embed.proj.weight')}
    torch.save(vit, small / 'vit.pth')
    name, copy, scenes, reid, fashion = (out / name for name in ('out.pth', 'copy', 'scenes', 'reid', 'fashion'))
    found = {name: c for name, c in commands(small, out).items() if c.output and name != 'test'}
    return found | dict(
        convert=Command('convert_checkpoint', ['transreid', small / 'vit.pth', name], name, read_checkpoint),
        corrupt=Command('corrupt_images', [small / 'images', copy, 'blur'], copy, os.listdir),
        scenes=Command('make_scenes', [scenes, '--train', 1, '--val', 1, '--size', 64], scenes, os.listdir),
        reid=Command('make_reid', [reid, '--ids', 2, '--test-ids', 2, '--size', 32], reid, os.listdir),
        fashion=Command('prepare_fashion_mnist', [fashion], fashion, os.listdir),
    )


@pytest.fixture
def disk(tmp_path_factory):
    """A disk of 64 KiB without any space left."""
    folder = tmp_path_factory.mktemp('disk')
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small disk needs root, and a machine that allows it')
    with open(folder / 'filler', 'wb', buffering=0) as file, pytest.raises(OSError, match='No space left'):
        while True:
            file.write(bytes(4096))
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.parametrize('state', ['full', 'read-only'])
def test_full_and_read_only_disks(state, small, disk):
    """Every tool says so, and leaves nothing."""
    if state == 'read-only':
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    before = contents(disk)
    for name, command in all_commands(small, disk).items():
        code = run(command.tool, *command.args)
        assert code and ('No space left' if state == 'full' else 'Read-only') in code, name
        assert contents(disk) == before and not [path for path in disk.iterdir() if path.is_dir()], name


def test_a_picture_that_does_not_fit_keeps_the_checkpoint_from_being_written(small, disk, tmp_path):
    command = commands(small, tmp_path)['schedule']
    code = run(command.tool, *command.args, '--plot', disk / 'plot.png')
    assert 'plot.png cannot be written: No space left' in code
    assert not list(tmp_path.iterdir())


# Names


def test_odd_and_long_paths(tmp_path):
    """Every tool works below a path of more than 1000 bytes in many alphabets, with spaces and quotes."""
    folder = tmp_path / 'Größe 日本 🙂 "a" \'b\' {c} %s $d [e] *'
    for _ in range(4):
        folder = folder / ('ü' * 100)
    (folder / 'out').mkdir(parents=True)
    small = make_small(folder)
    known = commands(small, folder / 'out')
    for name, command in (known | all_commands(small, folder / 'out')).items():
        args = [*command.args, '--overwrite'] if command.output and name != 'test' else command.args
        assert run(command.tool, *args) is None, name
        if command.output:
            command.whole(command.output)


def test_the_longest_name_that_a_disk_takes(small, tmp_path):
    """255 bytes, also where a character takes four; and one more is refused."""
    for name in ('x' * 251 + '.pth', '🙂' * 62 + 'xxx.pth', 'é' * 125 + 'x.pth'):
        assert len(os.fsencode(name)) == 255
        assert run('fuse_checkpoint', small / 'config.pth', tmp_path / name) is None
        assert read_checkpoint(tmp_path / name)
        assert 'File name too long' in run('fuse_checkpoint', small / 'config.pth', tmp_path / f'x{name}')
    folder = tmp_path / 'made'
    for name, command in all_commands(small, folder).items():
        if command.output.suffix == '':
            long = folder.with_name('é' * 127)
            assert run(command.tool, *[long if arg == command.output else arg for arg in command.args]) is None, name
            assert os.listdir(long)
            subprocess.run(['rm', '-r', str(long)], check=True)


@pytest.mark.parametrize('length', [300, 5000])
def test_names_that_are_too_long(length, small, tmp_path):
    """As input or as output: a sentence."""
    long = 'x' * length
    for name, command in all_commands(small, tmp_path).items():
        for place, arg in enumerate(command.args):
            if isinstance(arg, Path):
                args = [*command.args]
                args[place] = arg.with_name(f'{long}{arg.suffix}')
                assert run(command.tool, *args), f'{name}, {place}'
    assert not list(tmp_path.iterdir())


# Links


def test_links_to_inputs_and_outputs(small, tmp_path):
    """Links are followed to read; an output that is a link is replaced, and what it led to stays."""
    for name, target in dict(inside=small / 'config.pth', nowhere=tmp_path / 'no.pth', loop=tmp_path / 'loop').items():
        (tmp_path / name).symlink_to(target)
    kept = tmp_path / 'kept.pth'
    kept.write_bytes(b'keep me')
    (tmp_path / 'latest.pth').symlink_to(kept)
    assert run('fuse_checkpoint', tmp_path / 'inside', tmp_path / 'out.pth') is None
    assert 'exists' in run('fuse_checkpoint', tmp_path / 'inside', tmp_path / 'latest.pth')
    assert run('fuse_checkpoint', tmp_path / 'inside', tmp_path / 'latest.pth', '--overwrite') is None
    assert kept.read_bytes() == b'keep me' and not (tmp_path / 'latest.pth').is_symlink()
    assert read_checkpoint(tmp_path / 'latest.pth')
    for name in ('nowhere', 'loop'):
        assert run('fuse_checkpoint', tmp_path / name, tmp_path / 'other.pth')
    assert not (tmp_path / 'other.pth').exists()
    assert (tmp_path / 'inside').is_symlink()


def test_links_among_images(small, tmp_path):
    """A folder may be a link, and hold links to images and to itself; one that leads nowhere is named, so is a pipe."""
    images, linked, copy = tmp_path / 'images', tmp_path / 'linked', tmp_path / 'copy'
    images.mkdir()
    (images / 'a.png').symlink_to(small / 'images/cat/0.png')
    (images / 'again').symlink_to(images)
    linked.symlink_to(images)
    assert run('corrupt_images', linked, copy, 'blur') is None
    assert os.listdir(copy) == ['a.png']
    (images / 'b.png').symlink_to(tmp_path / 'nowhere.png')
    assert 'b.png' in run('corrupt_images', linked, tmp_path / 'more', 'blur')
    (images / 'b.png').unlink()
    os.mkfifo(images / 'c.png')
    for command in (
        Command('corrupt_images', [linked, tmp_path / 'more', 'blur']),
        commands(small, tmp_path)['extract'],
    ):
        args = [linked if arg == small / 'images' else arg for arg in command.args]
        assert 'c.png is not a file' in run(command.tool, *args)


# Size


@pytest.mark.slow
def test_more_than_two_gibibytes(tmp_path):
    """The layer to fuse lies beyond 2^31 bytes in the file."""
    state = dict(other=torch.zeros(2**29 + 1000), **denoised_state(3, size=8))
    state['fc.denoiser.weight'] += 0.5 * torch.eye(8)
    torch.save(dict(state_dict=state), tmp_path / 'in.pth')
    fuse_checkpoint(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert (tmp_path / 'out.pth').stat().st_size > 2**31
    fused = torch.load(tmp_path / 'out.pth', weights_only=True, mmap=True)['state_dict']
    assert fused['other'].shape == state['other'].shape
    assert torch.equal(fused['fc.weight'], torch.full((8, 8), 1.5))

"""Files under harm: disks that take nothing, odd and long names, links."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from hardening_helpers import Command, commands, contents, make_small, read_checkpoint, run


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp('small'))


def all_commands(small, out):
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


def test_odd_and_long_paths(tmp_path):
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
    long = 'x' * length
    for name, command in all_commands(small, tmp_path).items():
        for place, arg in enumerate(command.args):
            if isinstance(arg, Path):
                args = [*command.args]
                args[place] = arg.with_name(f'{long}{arg.suffix}')
                assert run(command.tool, *args), f'{name}, {place}'
    assert not list(tmp_path.iterdir())


def test_links_to_inputs_and_outputs(small, tmp_path):
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

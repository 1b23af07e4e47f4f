"""A small model with all its files, and runs of tools in this process that may only end as they should."""

import copy
import io
import json
import os
import pickle
import shutil
import signal
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnx
import torch
from mmengine.registry import MODELS, init_default_scope

import mmdenoiserep.tasks.reid  # noqa: F401  (registers the head)
from helpers import ROOT, randomise
from mmdenoiserep.core import load_moments
from tools_helpers import run_tool

LIMIT = 60
"""Seconds after which a tool hangs; on these inputs it takes milliseconds."""


class Hang(BaseException):
    """A tool did not come back in time."""


@contextmanager
def time_limit():
    """Raises Hang in the middle of whatever takes too long."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(tool, *args):
    """Runs a tool in this process; returns the sentence with which it refuses, or None."""
    shown = io.TextIOWrapper(io.BytesIO(), 'utf-8')  # as strict about characters as a terminal
    try:
        with time_limit(), redirect_stdout(shown), redirect_stderr(io.StringIO()):
            run_tool(tool, *args)
    except SystemExit as stopped:
        code = stopped.code
        assert isinstance(code, str) and code.startswith(f'{tool}: ') and code.isprintable(), code
        assert not is_slip(stopped.__context__), code
        return code


def is_slip(error):
    """Whether an error that a sentence blames on the input is a slip of the pen in code of this project."""
    if not isinstance(error, NameError | UnboundLocalError | AssertionError | ImportError) or error.__cause__:
        return False
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(where.is_relative_to(ROOT / folder) for folder in ('mmdenoiserep', 'tools', 'studies'))


def contents(folder):
    return {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob('*') if not p.is_dir()}


class Command(NamedTuple):
    """The name of a tool with its arguments, the file or folder that it writes, and what reads that."""

    tool: str
    args: list
    output: Path | None = None
    whole: Callable[[Path], object] | None = None


def commands(small, out, config=None, checkpoint=None):
    """Returns a command for each tool that takes a config or a checkpoint, those of :func:`make_small` by default."""
    both = [config or small / 'config.py', checkpoint or small / 'config.pth']
    reid = [config or small / 'reid.py', checkpoint or small / 'reid.pth']
    name, log = out / 'out.pth', ['--work-dir', small.parent / 'log']
    figures = ['--out', out / 'figures', '--show', 1, '--num-images', 2]
    fit = ['--source', small / 'moments.pth', '--images', small / 'dark', '--accept', 'all']
    export = [both[0], checkpoint or small / 'fused.pth', out / 'out.onnx']
    return dict(
        print_targets=Command('print_targets', both[:1]),
        fuse=Command('fuse_checkpoint', [both[1], name], name, read_checkpoint),
        verify=Command('fuse_checkpoint', [both[1], name, '--verify', both[0]], name, read_checkpoint),
        moments=Command('calibrate', ['moments', *both, name], name, load_moments),
        schedule=Command('calibrate', ['schedule', *both, name], name, read_checkpoint),
        domain=Command('calibrate', ['domain', *both, name, *fit], name, read_checkpoint),
        extract=Command('extract_features', [*reid, small / 'images', out / 'out.npz'], out / 'out.npz', np.load),
        draw=Command('draw_matches', [both[0], small / 'matches.json', out / 'out.png'], out / 'out.png', read_image),
        test=Command('test', [*both, *log, '--out', out / 'out.pkl'], out / 'out.pkl', read_pickle),
        visualize=Command('visualize', [*both, small / 'config.pth', *figures], out / 'figures', os.listdir),
        export=Command('export_onnx', export, out / 'out.onnx', onnx.load),
        train=Command('train', [both[0], *log, *(['--resume', checkpoint] if checkpoint else [])]),
    )


def read_checkpoint(path):
    return torch.load(path, weights_only=True)['state_dict']


def read_image(path):
    assert cv2.imread(str(path)) is not None


def read_pickle(path):
    return pickle.loads(path.read_bytes())


def survive(folder, command):
    """Runs a command on input that may be bad and removes what it writes; returns its sentence, or None.

    Anything but success or SystemExit with one printable line fails; so does a file in the folder that was not there
    before and is not the output, an output beside a refusal, and an output that can't be read.
    """
    before = contents(folder)
    code = run(command.tool, *command.args)
    if command.output and not code and '--dry-run' not in command.args:
        command.whole(command.output)
        if command.output.is_dir():
            shutil.rmtree(command.output)
        else:
            command.output.unlink()
            command.output.with_suffix('.png').unlink(missing_ok=True)  # the picture of a calibration
    assert contents(folder) == before
    return code


def as_config(settings):
    return ''.join(f'{key} = {value!r}\n' for key, value in settings.items())


def small_config(folder, reid=False):
    """Returns the config of a classifier, or of a model for re-identification, of the images in ``folder/images``."""
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=16), dict(type='PackInputs')]
    dataset = dict(type='CustomDataset', data_root=str(folder / 'images'), pipeline=steps, serialize_data=False)
    sampler = dict(type='DefaultSampler', shuffle=False)
    loader = dict(batch_size=2, num_workers=0, sampler=sampler, dataset=dataset)
    arch = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8)
    vit = dict(type='VisionTransformer', img_size=16, patch_size=8, out_type='cls_token', arch=arch)
    classifier = dict(type='VisionTransformerClsHead', num_classes=2, in_channels=8, topk=(1,))
    return dict(
        default_scope='mmpretrain',
        custom_imports=dict(imports=['mmdenoiserep', 'mmdenoiserep.tasks.reid']),
        custom_hooks=[dict(type='DenoiseLossHook')],
        model=dict(
            type='ImageClassifier',
            backbone=dict(type='DenoiseRepBackbone', backbone=vit, targets='all', image_size=16),
            head=dict(type='BNNeckReIDHead', num_classes=2, in_channels=8) if reid else classifier,
        ),
        data_preprocessor=dict(num_classes=2),
        train_dataloader=loader,
        test_dataloader=copy.deepcopy(loader),
        train_cfg=dict(by_epoch=False, max_iters=1),
        test_cfg=dict(),
        test_evaluator=dict(type='SingleLabelMetric', num_classes=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(checkpoint=None),
        log_level='ERROR',
    )


def make_small(folder):
    """Fills a folder: images of two classes, dark ones, config.py, reid.py, checkpoints, moments and matches.json."""
    for label in ('cat', 'dog'):
        (folder / 'images' / label).mkdir(parents=True)
        for i in range(2):
            image = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            (folder / 'images' / label / f'{i}.png').write_bytes(cv2.imencode('.png', image)[1].tobytes())
    (folder / 'dark').mkdir()
    for i in range(8):  # for a fit, which changes nothing where there is nothing to correct
        image = np.random.default_rng(i).integers(0, 60, (16, 16, 3), dtype=np.uint8)
        (folder / 'dark' / f'{i}.png').write_bytes(cv2.imencode('.png', image)[1].tobytes())
    init_default_scope('mmpretrain')
    for name in ('config', 'reid'):
        config = small_config(folder, reid=name == 'reid')
        (folder / f'{name}.py').write_text(as_config(config))
        torch.manual_seed(0)
        model = randomise(MODELS.build(dict(config['model'], data_preprocessor=config['data_preprocessor'])))
        torch.save(dict(meta=dict(epoch=3), state_dict=model.state_dict()), folder / f'{name}.pth')
    assert not run('fuse_checkpoint', folder / 'config.pth', folder / 'fused.pth')
    assert not run('calibrate', 'moments', folder / 'config.py', folder / 'config.pth', folder / 'moments.pth')
    image = dict(sample_idx=0, img_path=str(folder / 'images/cat/0.png'), pid=1, camid=0)
    found = dict(image, distance=0.1, correct=True)
    (folder / 'matches.json').write_text(json.dumps([dict(image, ap=0.5, matches=[found])]))
    return folder

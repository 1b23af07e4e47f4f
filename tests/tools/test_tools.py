"""The tools as commands: every library end to end, help, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from helpers import ROOT
from tools_helpers import find_tool, metrics, python, run_process, run_tool, sentence, with_random_denoisers

DEMO = ROOT / 'configs/demo'
HELPFUL = sorted((ROOT / 'tools').glob('*.py')) + [
    find_tool(name) for name in ('make_scenes', 'make_reid', 'prepare_fashion_mnist', 'demo', 'study', 'robustness')
]
TRAINING = ['--cfg-options', 'load_from=None', 'train_cfg.max_iters=2', 'default_hooks.logger.interval=1']


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A folder to work in, with a few composed scenes and a few folders of classified images."""
    root = tmp_path_factory.mktemp('user')
    run_tool('make_scenes', root / 'work_dirs/scenes', '--train', 4, '--val', 2)
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label in ('cat', 'dog'):
            (root / 'images' / split / label).mkdir(parents=True)
            for i in range(3):
                image = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                cv2.imwrite(str(root / 'images' / split / label / f'{i}.png'), image)
    return root


SEGMENTATION = """
_base_ = ['mmseg::_base_/models/fcn_r50-d8.py', 'mmseg::_base_/default_runtime.py']
norm = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(depth=18, norm_cfg=norm, base_channels=16),
    decode_head=dict(in_channels=128, in_index=3, channels=16, num_classes=11, norm_cfg=norm),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=11, norm_cfg=norm),
)
metainfo = dict(classes=[str(i) for i in range(11)], palette=[[i, i, i] for i in range(11)])
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
def_loader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='BaseSegDataset', data_root='work_dirs/scenes', metainfo=metainfo, pipeline=load,
                 data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
train_dataloader = def_loader
test_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='BaseSegDataset', data_root='work_dirs/scenes', metainfo=metainfo, pipeline=load,
                 data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation')))
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
"""

CLASSIFICATION = """
_base_ = ['mmpretrain::_base_/default_runtime.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VisionTransformer', img_size=32, patch_size=8, out_type='cls_token',
                  arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)),
    head=dict(type='VisionTransformerClsHead', num_classes=2, in_channels=32, topk=(1,)))
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='images', data_prefix='train', pipeline=pipeline))
test_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='images', data_prefix='val', pipeline=pipeline))
data_preprocessor = dict(num_classes=2)
test_evaluator = dict(type='SingleLabelMetric', num_classes=2)
train_cfg = dict(by_epoch=False, max_iters=2)
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.001))
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
randomness = dict(seed=0)
"""

DENOISED = """
_base_ = ['./vanilla.py']
custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
custom_hooks = [dict(type='DenoiseLossHook'), dict(type='DenoiseFusionHook')]
model = dict(backbone=dict(
    _delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, targets='all', image_size=32))
"""


def write_configs(folder, vanilla):
    """Writes a user's own config and the one that inherits it with denoising; returns both paths."""
    folder.mkdir()
    (folder / 'vanilla.py').write_text(vanilla)
    (folder / 'denoised.py').write_text(DENOISED)
    return folder / 'vanilla.py', folder / 'denoised.py'


@pytest.fixture(scope='session')
def user_configs(tmp_path_factory):
    root = tmp_path_factory.mktemp('configs')
    return {
        'mmdet': (DEMO / 'mask-rcnn_swin_scenes.py', DEMO / 'mask-rcnn_swin_scenes_denoiserep.py'),
        'mmseg': write_configs(root / 'mmseg', SEGMENTATION),
        'mmpretrain': write_configs(root / 'mmpretrain', CLASSIFICATION),
    }


@pytest.fixture(scope='session')
def trained(scenes, user_configs):
    """A checkpoint of the classifier after two iterations, with random denoisers in it."""
    run_process('train', user_configs['mmpretrain'][1], '--work-dir', 'trained', cwd=scenes)
    return with_random_denoisers(scenes / 'trained/iter_2.pth', scenes / 'trained/random.pth')


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
def test_train_fuse_and_evaluate_in_the_unchanged_config(library, scenes, user_configs, tmp_path, capsys):
    vanilla, denoised = user_configs[library]
    options = TRAINING if library == 'mmdet' else []
    log = run_process('train', denoised, '--work-dir', tmp_path / 'run', *options, cwd=scenes)
    assert 'loss_denoise: ' in log
    assert 'steps' in log and 'in execution order' in log, 'the conversion table is logged'
    assert (tmp_path / 'run/iter_2_fused.pth').is_file(), 'DenoiseFusionHook writes a sibling'

    checkpoint = with_random_denoisers(tmp_path / 'run/iter_2.pth', tmp_path / 'random.pth')
    fused = tmp_path / 'fused.pth'
    run_tool('fuse_checkpoint', checkpoint, fused, '--verify', denoised, cwd=scenes)
    printed = capsys.readouterr().out
    assert 'layers fused' in printed and ' ok' in printed and 'TOO LARGE' not in printed

    run_process('test', denoised, checkpoint, '--work-dir', tmp_path / 'unfused', cwd=scenes)
    run_process('test', vanilla, fused, '--work-dir', tmp_path / 'fused', cwd=scenes)
    unfused, after = metrics(tmp_path / 'unfused'), metrics(tmp_path / 'fused')
    assert unfused.keys() == after.keys() and unfused
    assert after == pytest.approx(unfused, abs=1e-3)


def test_the_control_is_the_same_run_without_denoising(scenes, user_configs, tmp_path):
    """Joint training leaves the label losses of the first iteration as they are in the control, to the last digit."""
    losses = {}
    for name in ('baseline-ft', 'denoiserep'):
        config = DEMO / f'mask-rcnn_swin_scenes_{name}.py'
        run_process('train', config, '--work-dir', tmp_path / name, *TRAINING, 'train_cfg.val_interval=100', cwd=scenes)
        path = next((tmp_path / name).glob('*/vis_data/scalars.json'))
        losses[name] = json.loads(path.read_text().splitlines()[0])
    first, control = losses['denoiserep'], losses['baseline-ft']
    assert 'loss_denoise' in first and 'loss_denoise' not in control
    assert all(first[key] == value for key, value in control.items() if key.startswith('loss_'))


def test_print_targets(scenes, user_configs, capsys):
    vanilla, denoised = user_configs['mmpretrain']

    def table(*args):
        run_tool('print_targets', *args, cwd=scenes)
        return capsys.readouterr().out

    default, full = table(denoised), table(vanilla, '--rank', 0)
    assert 'layers.0.attn.qkv' in default and 'mmpretrain.models.backbones' in default
    mlp = table(vanilla, '--targets', 'mlp', '--rank', 4, '--exclude', r'layers\.1\..*')
    assert 'layers.0.ffn.layers.1' in mlp and 'layers.1.' not in mlp and 'qkv' not in mlp
    extra = [int(re.search(r'([\d,]+) extra parameters \(', text)[1].replace(',', '')) for text in (mlp, default, full)]
    assert extra[0] < extra[1] < extra[2]
    assert "'layers.0.qvk'" in sentence('print_targets', vanilla, '--targets', 'layers.0.qvk', cwd=scenes)
    assert 'nowhere.py' in sentence('print_targets', 'nowhere.py', cwd=scenes)


@pytest.mark.parametrize('path', HELPFUL, ids=lambda path: path.stem)
def test_help_is_shown_without_torch(path, tmp_path):
    options = ['-m', f'studies.{path.stem}'] if path.parent.name == 'studies' else [path]
    shown = python('-X', 'importtime', *options, '--help', cwd=tmp_path)
    assert 'usage: ' in shown
    imported = set(re.findall(r'[| ](\w+)$', shown, re.MULTILINE))
    assert 'argparse' in imported
    assert path.parent.name == 'studies' or not imported & {'torch', 'mmengine', 'numpy', 'matplotlib'}


@pytest.mark.parametrize(
    ('override', 'expected'),
    [
        ('model.backbone.targets=layers.9.*', 'matches no layer'),
        ('model.backbone.targets=(', 'no valid regular expression'),
        ('model.backbone.rank=0', 'patch_embed.projection: the rank'),
        ('model.backbone.backbone.type=VisionTransfromer', 'found no backbone'),
        ('default_scope=None', 'default_scope'),
    ],
)
def test_a_wrong_setting_ends_in_one_sentence(override, expected, scenes, user_configs):
    config = user_configs['mmpretrain'][1]
    assert expected in sentence('print_targets', config, '--cfg-options', override, cwd=scenes)


def test_fusing_twice_and_the_wrong_pairings(scenes, user_configs, trained, tmp_path):
    vanilla, denoised = user_configs['mmpretrain']
    fused = tmp_path / 'fused.pth'
    run_tool('fuse_checkpoint', trained, fused)
    before = fused.read_bytes()
    for words, *args in (
        ('fused already', fused, 'again.pth'),
        ('exists', trained, fused),
        ('the input itself', trained, trained, '--overwrite'),
        ('needs the config', trained, 'again.pth', '--verify', vanilla),
        ('does not fit', trained, 'again.pth', '--verify', user_configs['mmseg'][1]),
    ):
        assert words in sentence('fuse_checkpoint', *args, cwd=scenes)
    assert not (scenes / 'again.pth').exists()
    run_tool('fuse_checkpoint', trained, fused, '--overwrite')
    assert fused.read_bytes() == before, 'fusing is bitwise reproducible'
    for config, file, words in ((vanilla, trained, 'tools/fuse_checkpoint.py'), (denoised, fused, 'is fused')):
        shown = run_process('test', config, file, cwd=scenes, code=1)
        assert words in shown.splitlines()[-1] and 'Traceback' not in shown


def test_interrupt_while_writing(trained, tmp_path):
    before = trained.read_bytes()
    script = f"""
import runpy, signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
save = torch.save
def slow(content, file):
    file.write(b'x' * 1000)
    file.flush()
    print('writing', flush=True)
    time.sleep(60)
torch.save = slow
sys.argv = ['fuse_checkpoint.py', {str(trained)!r}, 'fused.pth']
runpy.run_path({str(ROOT / 'tools/fuse_checkpoint.py')!r}, run_name='__main__')
"""
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', script],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().strip() == 'writing'
    assert list(tmp_path.iterdir()), 'a temporary file is there while it is being written'
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.endswith('fuse_checkpoint: interrupted\n') and 'Traceback' not in errors
    assert not list(tmp_path.iterdir())
    assert trained.read_bytes() == before

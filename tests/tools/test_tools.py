"""The command line as a user meets it: every library end to end, and bad input, by subprocess."""

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
import torch

from helpers import ROOT
from tools_helpers import run_process, sentence

DEMO = ROOT / 'configs/demo'
TRAINING = ['--cfg-options', 'load_from=None', 'train_cfg.max_iters=2', 'default_hooks.logger.interval=1']


def refusal(name, *args, cwd):
    """Runs a tool on bad input and returns the one sentence that it must end with, exit code 1 and no traceback."""
    output = run_process(name, *args, cwd=cwd, code=1)
    assert 'Traceback' not in output, output
    return next(line for line in reversed(output.splitlines()) if line.startswith(f'{name}: '))


def with_random_denoisers(source, target):
    """Rewrites a checkpoint with denoisers large enough to change what the model computes."""
    checkpoint = torch.load(source, weights_only=False)
    generator = torch.Generator().manual_seed(0)
    for key, value in checkpoint['state_dict'].items():
        if '.denoiser.' in key:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5)
    torch.save(checkpoint, target)
    return target


def metrics(work_dir):
    """Returns the numbers of the last evaluation in a work dir, without its timings."""
    newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    line = json.loads(newest.read_text().splitlines()[-1])
    return {key: value for key, value in line.items() if key not in ('time', 'data_time', 'step')}


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A folder to work in, with a few composed scenes and a few folders of classified images."""
    root = tmp_path_factory.mktemp('user')
    run_process(
        'make_scenes', 'work_dirs/scenes', '--train', 4, '--val', 2, '--source', ROOT / 'demo/fashion-mnist', cwd=root
    )
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
    """Configs outside of the repository, by library; detection takes the configs of the demo."""
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
def test_train_fuse_and_evaluate_in_the_unchanged_config(library, scenes, user_configs, tmp_path):
    """Train, fuse with --verify, evaluate unfused and fused: the same metrics; loss_denoise is in the log."""
    vanilla, denoised = user_configs[library]
    options = TRAINING if library == 'mmdet' else []
    log = run_process('train', denoised, '--work-dir', tmp_path / 'run', *options, cwd=scenes)
    assert 'loss_denoise: ' in log
    assert 'steps' in log and 'in execution order' in log, 'the conversion table is logged'
    assert (tmp_path / 'run/iter_2_fused.pth').is_file(), 'DenoiseFusionHook writes a sibling'

    checkpoint = with_random_denoisers(tmp_path / 'run/iter_2.pth', tmp_path / 'random.pth')
    fused = tmp_path / 'fused.pth'
    printed = run_process('fuse_checkpoint', checkpoint, fused, '--verify', denoised, cwd=scenes)
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
    assert {key: first[key] for key in control if key.startswith('loss_')} == {
        key: value for key, value in control.items() if key.startswith('loss_')
    }


def test_resume_continues_a_training_run(scenes, user_configs, trained, tmp_path):
    """--resume takes up the last checkpoint of the work dir, whose message hub holds pickled mmengine objects."""
    config = user_configs['mmpretrain'][1]
    run_process('train', config, '--work-dir', tmp_path, cwd=scenes)
    log = run_process(
        'train', config, '--work-dir', tmp_path, '--resume', '--cfg-options', 'train_cfg.max_iters=4', cwd=scenes
    )
    assert 'resumed' in log and (tmp_path / 'iter_4_fused.pth').is_file()
    assert 'does not exist' in refusal('train', config, '--resume', 'nowhere.pth', cwd=tmp_path)


def extra_of(table):
    """Returns the extra parameters that a table of a conversion ends with."""
    return int(re.search(r'([\d,]+) extra parameters \(', table)[1].replace(',', ''))


def test_print_targets(scenes, user_configs):
    """The table can be had without training, for denoised and for vanilla configs."""
    vanilla, denoised = user_configs['mmpretrain']
    table = run_process('print_targets', denoised, cwd=scenes)
    assert 'layers.0.attn.qkv' in table and 'extra parameters' in table and 'mmpretrain.models.backbones' in table
    mlp = run_process(
        'print_targets', vanilla, '--targets', 'mlp', '--rank', 4, '--exclude', r'layers\.1\..*', cwd=scenes
    )
    assert 'layers.0.ffn.layers.1' in mlp and 'layers.1.' not in mlp and 'qkv' not in mlp
    full = run_process('print_targets', vanilla, '--rank', 0, cwd=scenes)
    assert extra_of(mlp) < extra_of(table) < extra_of(full)
    assert "'layers.0.qvk'" in sentence('print_targets', vanilla, '--targets', 'layers.0.qvk', cwd=scenes)


@pytest.mark.parametrize(
    'name',
    ['train', 'test', 'fuse_checkpoint', 'calibrate', 'print_targets', 'make_scenes', 'corrupt_images', 'demo', 'study']
    + ['robustness'],
)
def test_help(name, tmp_path):
    """Every tool explains itself."""
    assert 'usage: ' in run_process(name, '--help', cwd=tmp_path)


def test_training_without_the_hook_is_an_error(scenes, user_configs, tmp_path):
    """A config that wraps the backbone and forgets the hook does not train silently."""
    config = user_configs['mmpretrain'][1]
    log = run_process('train', config, '--work-dir', tmp_path, '--cfg-options', 'custom_hooks=[]', cwd=scenes, code=1)
    assert 'add custom_hooks' in log.splitlines()[-1]


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
    """print_targets shows what training would stop at, without a traceback."""
    config = user_configs['mmpretrain'][1]
    assert expected in sentence('print_targets', config, '--cfg-options', override, cwd=scenes)


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (['--launcher', 'pytorch'], 'needs RANK in the environment'),
        (['--launcher', 'slurm'], 'needs SLURM_PROCID in the environment'),
        (['--amp', '--cfg-options', 'optim_wrapper=None'], 'the config has no optim_wrapper'),
        (['--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'], 'has no auto_scale_lr.base_batch_size'),
        (['--cfg-options', 'log_level.x=1'], '--cfg-options do not fit'),
        (['--cfg-options', 'work_dir=[1,'], '--cfg-options cannot be read'),
        (['--cfg-options', 'train_dataloader.dataset.pipeline.99.type=X'], '--cfg-options do not fit'),
        ([], 'DenoiseLossHook found no denoised layer in the model'),
    ],
)
def test_a_training_that_cannot_begin_ends_in_one_sentence(args, expected, scenes, user_configs, tmp_path):
    """Also where a hook finds out only when all is built and loaded."""
    base = user_configs['mmpretrain'][0]
    imports = "custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)"
    hooks = "custom_hooks = [dict(type='DenoiseLossHook')]"
    (tmp_path / 'mine.py').write_text(f'_base_ = {str(base)!r}\n{imports}\n{hooks}\n')
    args = args or ['--cfg-options', 'load_from=None']
    assert expected in refusal('train', tmp_path / 'mine.py', '--work-dir', tmp_path, *args, cwd=scenes)


def test_unreadable_configs(scenes, trained, tmp_path):
    """A missing or broken config is named, and --verify refuses a config without denoising."""
    (tmp_path / 'broken.py').write_text('model = dict(')
    for name, args in {
        'train': ['broken.py'],
        'test': ['broken.py', trained],
        'print_targets': ['nowhere.py'],
        'fuse_checkpoint': [trained, 'out.pth', '--verify', 'broken.py'],
    }.items():
        assert args[-1 if name == 'fuse_checkpoint' else 0] in refusal(name, *args, cwd=tmp_path)
    assert not (tmp_path / 'out.pth').exists()


def test_fusing_twice_and_the_wrong_pairings(scenes, user_configs, trained, tmp_path):
    """Fused files are refused where denoisers are expected, and denoised files where they are not."""
    vanilla, denoised = user_configs['mmpretrain']
    fused = tmp_path / 'fused.pth'
    run_process('fuse_checkpoint', trained, fused, cwd=tmp_path)
    before = fused.read_bytes()
    assert 'fused already' in sentence('fuse_checkpoint', fused, 'again.pth', cwd=tmp_path)
    assert 'exists' in sentence('fuse_checkpoint', trained, fused, cwd=tmp_path)
    assert 'the input itself' in sentence('fuse_checkpoint', trained, trained, '--overwrite', cwd=tmp_path)
    run_process('fuse_checkpoint', trained, fused, '--overwrite', cwd=tmp_path)
    assert fused.read_bytes() == before, 'fusing is bitwise reproducible'
    assert 'tools/fuse_checkpoint.py' in refusal('test', vanilla, trained, cwd=scenes)
    assert 'is fused' in refusal('test', denoised, fused, cwd=scenes)
    assert 'needs the config' in sentence('fuse_checkpoint', trained, 'v.pth', '--verify', vanilla, cwd=scenes)
    assert not (tmp_path / 'again.pth').exists() and not (scenes / 'v.pth').exists()


def test_verify_refuses_a_checkpoint_of_another_model(scenes, user_configs, trained, tmp_path):
    """Names and shapes must be those of the config; otherwise nothing is written."""
    message = sentence('fuse_checkpoint', trained, tmp_path / 'x.pth', '--verify', user_configs['mmseg'][1], cwd=scenes)
    assert 'does not fit' in message
    assert not (tmp_path / 'x.pth').exists()


OUTER = """
import torch
from mmengine.registry import MODELS
@MODELS.register_module()
class Outer(torch.nn.Module):
    def __init__(self, detector, data_preprocessor=None):
        super().__init__()
        self.detector = MODELS.build(detector)
"""


def test_verify_finds_a_backbone_anywhere(scenes, user_configs, trained, tmp_path):
    """Some models hold another one, such as a student or a detector."""
    (tmp_path / 'outer.py').write_text(OUTER)
    imports = "custom_imports = dict(imports=['mmdenoiserep', 'outer'])"
    model = "model = dict(_delete_=True, type='Outer', detector=_base_.model)"
    (tmp_path / 'mine.py').write_text(f'_base_ = {str(user_configs["mmpretrain"][1])!r}\n{imports}\n{model}\n')
    checkpoint = torch.load(trained, weights_only=False)
    checkpoint['state_dict'] = {f'detector.{key}': value for key, value in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'in.pth')
    files = [tmp_path / 'in.pth', tmp_path / 'out.pth', '--verify', tmp_path / 'mine.py']
    printed = run_process('fuse_checkpoint', *files, cwd=scenes, env=dict(PYTHONPATH=str(tmp_path)))
    assert 'detector.backbone on two random images' in printed and (tmp_path / 'out.pth').exists()


def test_bad_files_leave_nothing_behind(trained, tmp_path):
    """Truncated files and pickles that need code: one sentence, exit code 1, no output."""
    whole = trained.read_bytes()
    (tmp_path / 'half.pth').write_bytes(whole[: len(whole) // 2])
    torch.save({'state_dict': {}, 'run': subprocess.Popen}, tmp_path / 'code.pth')
    plain = {key: value for key, value in torch.load(trained, weights_only=False)['state_dict'].items()}
    torch.save({k: v for k, v in plain.items() if 'denoiser' not in k}, tmp_path / 'vanilla.pth')
    torch.save(plain | {k: v * torch.nan for k, v in plain.items() if 'denoiser' in k}, tmp_path / 'nan.pth')
    before = sorted(tmp_path.iterdir())
    for name, expected in {
        'half.pth': 'truncated',
        'code.pth': 'running code',
        'vanilla.pth': 'no denoiser',
        'nan.pth': 'NaN or Inf',
        'missing.pth': 'does not exist',
    }.items():
        message = sentence('fuse_checkpoint', name, 'out.pth', cwd=tmp_path)
        assert name in message and expected in message
    assert sorted(tmp_path.iterdir()) == before


def test_interrupt_while_writing(trained, tmp_path):
    """Ctrl-C in the middle of writing: exit code 1, one sentence, no file, the input as it was."""
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

"""The package as a wheel in another place, and a user's own configs outside of the repository."""

from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tools_helpers
from engine_helpers import is_denoiser
from tiny_datasets import write_ade20k, write_coco, write_imagenet

CONFIG = """
_base_ = '{base}'
custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
custom_hooks = [dict(type='DenoiseLossHook', mode='joint', weight=0.01), dict(type='DenoiseFusionHook')]
model = dict(backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone, image_size=64))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, num_batch_per_epoch=1)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
"""
LIBRARIES = {
    'mmdet': (
        'retinanet/retinanet_r18_fpn_1x_coco.py',
        ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9', 'model.backbone.backbone.init_cfg=None'],
        ['train_dataloader.dataset.pipeline.2.scale=(128,96)'],
        ['test_dataloader.dataset.pipeline.1.scale=(128,96)', 'model.test_cfg.score_thr=0.0'],
    ),
    'mmseg': (
        'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        ['train_cfg.max_iters=1', 'train_cfg.val_interval=9', 'model.backbone.backbone.init_cfg=None'],
        [
            'train_dataloader.dataset.pipeline.2.scale=(256,64)',
            'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
            'model.data_preprocessor.size=(64,64)',
        ],
        ['test_dataloader.dataset.pipeline.1.scale=(256,64)'],
    ),
    'mmpretrain': (
        'resnet/resnet18_8xb32_in1k.py',
        ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9'],
        ['train_dataloader.dataset.pipeline.1.scale=64'],
        ['test_dataloader.dataset.pipeline.1.scale=64', 'test_dataloader.dataset.pipeline.2.crop_size=64'],
    ),
}
"""A config of each library, and what keeps its training short, its images small and its detections above threshold."""
DATA = {
    'mmdet': ('coco', write_coco),
    'mmseg': ('ade/ADEChallengeData2016', write_ade20k),
    'mmpretrain': ('imagenet', write_imagenet),
}


def python(*args, cwd, path, code=0):
    return tools_helpers.python(*args, cwd=cwd, code=code, env=dict(PYTHONPATH=str(path)), checkout=False)


@pytest.fixture(scope='session')
def site(wheel):
    folder = wheel.with_name('site')
    pip = ['-m', 'pip', '--disable-pip-version-check', '--no-cache-dir', 'install', '--no-index', '--no-deps']
    python(*pip, '--target', folder, wheel, cwd=wheel.parent, path='')
    return folder


@pytest.fixture(scope='session')
def nowhere(tmp_path_factory):
    """A folder for the path of a Python that does not have the package, whatever else is installed."""
    folder = tmp_path_factory.mktemp('nowhere')
    (folder / 'mmdenoiserep.py').write_text("raise ModuleNotFoundError('not installed here')\n")
    return folder


def test_installed_and_not_installed(site, nowhere, tmp_path):
    where = python('-c', 'import mmdenoiserep as m; print(m.__file__)', cwd=tmp_path, path=site).strip()
    assert Path(where) == site / 'mmdenoiserep/__init__.py'
    error = python('-c', 'import mmdenoiserep', cwd=tmp_path, path=nowhere, code=1)
    assert 'not installed here' in error


@pytest.mark.parametrize('library', LIBRARIES)
def test_a_users_config_in_the_librarys_own_programs(library, site, nowhere, tmp_path):
    base, short, small_train, small_test = LIBRARIES[library]
    shipped = Path(find_spec(library).origin).parent / '.mim'
    folder, write = DATA[library]
    (tmp_path / 'data' / folder).parent.mkdir(parents=True)
    write(tmp_path / 'data' / folder)
    is_known = library != 'mmseg' or any(distributions(name='mmsegmentation'))  # to mmengine, by that name
    (tmp_path / 'mine.py').write_text(
        CONFIG.format(base=f'{library}::{base}' if is_known else shipped / 'configs' / base)
    )

    options = ['--cfg-options', *short, *small_train]
    log = python(shipped / 'tools/train.py', 'mine.py', *options, cwd=tmp_path, path=site)
    assert 'loss_denoise: ' in log and 'in execution order' in log

    run = tmp_path / 'work_dirs/mine'
    (fused,) = run.glob('*_fused.pth')
    trained = torch.load(fused.with_name(fused.name.replace('_fused', '')), weights_only=False)['state_dict']
    assert any(value.any() for key, value in trained.items() if is_denoiser(key)), 'the denoisers were trained'
    state = torch.load(fused, weights_only=True)['state_dict']
    assert list(state) == [key for key in trained if not is_denoiser(key)]
    assert any(not torch.equal(value, trained[key]) for key, value in state.items()), 'and folded in'

    options = ['--cfg-options', 'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']
    command = [shipped / 'tools/test.py', shipped / 'configs' / base, fused, *options, *small_test]
    log = python(*command, cwd=tmp_path, path=nowhere)
    assert f'Load checkpoint from {fused}' in log and 'do not match' not in log
    metric = {'mmdet': 'coco/bbox_mAP: ', 'mmseg': 'mIoU: ', 'mmpretrain': 'accuracy/top1: '}[library]
    assert metric in log

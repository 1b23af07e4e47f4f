"""Lazy configs, whose types are imported objects: what they say, and every tool with them."""

from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject

from helpers import ROOT
from mmdenoiserep.apis.config import enable_visualization_hook, use_amp, use_tta, without_denoising
from tiny_datasets import write_cifar10, write_coco
from tools_helpers import metrics, run_process, run_tool, with_random_denoisers

CONFIGS = ROOT / 'configs'
LAZY = CONFIGS / 'lazy'
SHIPPED = Path(mmdet.__file__).parents[1]
LIBRARIES = {'resnet18_8xb16_cifar10': 'mmpretrain', 'mask_rcnn_r50_fpn_1x_coco': 'mmdet'}
TEXT = {
    '_base_/resnet18_8xb16_cifar10': SHIPPED / 'mmpretrain/.mim/configs/resnet/resnet18_8xb16_cifar10.py',
    '_base_/mask_rcnn_r50_fpn_1x_coco': SHIPPED / 'mmdet/.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn_r50_fpn_1x_coco_baseline_ft': CONFIGS / 'coco/mask-rcnn_r50_fpn_1x_coco_baseline-ft.py',
    'mask_rcnn_r50_fpn_1x_coco_denoiserep': CONFIGS / 'coco/mask-rcnn_r50_fpn_1x_coco_denoiserep.py',
}
BY_ANOTHER_NAME = {'BatchNorm2d': 'BN', 'PretrainedInit': 'Pretrained'}
TINY = {
    'mmpretrain': [
        *(f'{part}_dataloader.dataset.type=unchecked.UncheckedCIFAR10' for part in ('train', 'val', 'test')),
        'train_dataloader.batch_size=8',
    ],
    'mmdet': [
        'train_dataloader.dataset.pipeline.2.scale=(128,96)',
        *(f'{part}_dataloader.dataset.pipeline.1.scale=(128,96)' for part in ('val', 'test')),
        *(f'{part}_dataloader.persistent_workers=False' for part in ('train', 'val', 'test')),
        *(f'{part}_dataloader.num_workers=0' for part in ('train', 'val', 'test')),
        'default_hooks.checkpoint.save_optimizer=False',
        'model.test_cfg.rcnn.score_thr=0.0',
    ],
}
"""Small images in place of large ones, and CIFAR-10 without the checksums of the real files."""
UNCHECKED = """
from mmpretrain.datasets import CIFAR10
class UncheckedCIFAR10(CIFAR10):
    train_list = [[name, None] for name, _ in CIFAR10.train_list]
    test_list = [[name, None] for name, _ in CIFAR10.test_list]
"""


def lazy(name):
    return Config.fromfile(LAZY / f'{name}.py')


def by_name(value):
    """Returns a config with the bare names of classes, as text configs write them, and without scopes."""
    if isinstance(value, dict):
        value = {key: by_name(item) for key, item in value.items() if key not in ('default_scope', '_scope_')}
        for key in {'type', 'dataset_type'} & set(value):
            name = value[key].split('.')[-1]
            value[key] = BY_ANOTHER_NAME.get(name, name)
        return value
    return type(value)(map(by_name, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize('name', TEXT)
def test_lazy_and_text_configs_say_the_same(name):
    """Every setting of the libraries' bases and of the COCO pair, but for what lazy configs do without."""
    ours, theirs = lazy(name), Config.fromfile(TEXT[name]).to_dict()
    assert ours.default_scope is None and 'custom_imports' not in ours
    theirs.pop('custom_imports', None)
    assert by_name(ours.to_dict()) == by_name(theirs)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('lazy')
    (root / 'data').mkdir()
    write_cifar10(root / 'data/cifar10')
    write_coco(root / 'data/coco')
    (root / 'unchecked.py').write_text(UNCHECKED)
    return root


def read_all(run):
    """Returns the configs that a run leaves: in its work dir, among its curves, and in its checkpoint."""
    (curves,) = run.glob('*/vis_data/config.py')
    (own,) = run.glob('*.py')
    text = torch.load(run / 'epoch_1.pth', weights_only=False)['meta']['cfg']
    return own, [Config.fromfile(own), Config.fromfile(curves), Config.fromstring(text, '.py')]


@pytest.mark.parametrize('name', LIBRARIES)
def test_every_tool_takes_a_lazy_config(name, data, tmp_path, capsys):
    library = LIBRARIES[name]
    denoised, vanilla = LAZY / f'{name}_denoiserep.py', LAZY / f'{name}_baseline_ft.py'

    def run(tool_name, *args, options=()):
        options = ['--cfg-options', *TINY[library], *options]
        return run_process(tool_name, *args, *options, cwd=data, env={'PYTHONPATH': data})

    log = run('train', denoised, '--work-dir', tmp_path / 'run', options=['load_from=None', 'train_cfg.max_epochs=1'])
    assert 'layers denoised' in log
    assert (tmp_path / 'run/epoch_1_fused.pth').is_file()

    dumped, configs = read_all(tmp_path / 'run')
    first = configs[0].to_dict()
    assert first['model']['backbone']['type'] == 'mmdenoiserep.DenoiseRepBackbone'
    assert all(config.to_dict() == first for config in configs)

    checkpoint = with_random_denoisers(tmp_path / 'run/epoch_1.pth', tmp_path / 'random.pth')
    fused = tmp_path / 'fused.pth'
    run_tool('fuse_checkpoint', checkpoint, fused, '--verify', denoised, cwd=data)
    printed = capsys.readouterr().out
    assert 'layers fused' in printed and ' ok' in printed

    for config, file, work_dir in ((dumped, checkpoint, 'unfused'), (vanilla, fused, 'fused')):
        log = run('test', config, file, '--work-dir', tmp_path / work_dir)
        assert 'do not match' not in log, log
    unfused, after = metrics(tmp_path / 'unfused'), metrics(tmp_path / 'fused')
    assert unfused and after == pytest.approx(unfused, abs=1e-3)


@pytest.mark.parametrize('kind', ['denoiserep', 'baseline_ft'])
def test_print_targets(kind, capsys):
    run_tool('print_targets', LAZY / f'resnet18_8xb16_cifar10_{kind}.py')
    table = capsys.readouterr().out
    assert 'resnet_cifar.ResNet_CIFAR' in table and '20 layers denoised' in table


def test_options_of_the_tools_know_objects_as_types():
    for name, drawing in {
        'resnet18_8xb16_cifar10': dict(enable=True, out_dir='drawn'),
        'mask_rcnn_r50_fpn_1x_coco': dict(draw=True, test_out_dir='drawn'),
    }.items():
        cfg = lazy(f'{name}_denoiserep')
        assert without_denoising(cfg.model) == lazy(f'{name}_baseline_ft').model
        use_amp(cfg)
        enable_visualization_hook(cfg, 'drawn')
        cfg.tta_model, cfg.tta_pipeline = dict(type=LazyObject('mmpretrain.models', 'AverageClsScoreTTA')), []
        use_tta(cfg)
        cfg = Config.fromstring(cfg.pretty_text, '.py')
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.default_hooks.visualization.to_dict().items() >= drawing.items()
        assert cfg.model.module.backbone.type == 'mmdenoiserep.DenoiseRepBackbone'

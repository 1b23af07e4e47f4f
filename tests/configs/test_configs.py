"""Every shipped config: what it says, and the whole way from a vanilla checkpoint to a fused file at its full size."""

import ast
import copy
import functools
import gc
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmpretrain.datasets import CIFAR10

from engine_helpers import assert_equal, inner, is_denoiser, runner_case, snapshot, split
from helpers import ROOT, randomise
from mmdenoiserep.core import fuse_state_dict, verify_fusion
from mmdenoiserep.core.method.record import find_records
from tiny_datasets import WRITERS, without_checksums, write_all

CONFIGS = ROOT / 'configs'
config_utils.load = functools.cache(config_utils.load)  # mmengine reads all metafiles again for every base

NAMES = sorted(
    path.relative_to(CONFIGS).with_suffix('').as_posix()
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.relative_to(CONFIGS).parts
)
DENOISED = [name for name in NAMES if name.endswith('_denoiserep')]
CONTROLS = [name for name in NAMES if name.endswith(('_baseline-ft', '_baseline_ft'))]
BASELINES = [name for name in NAMES if name not in DENOISED + CONTROLS]

QUICK = {
    'mask-rcnn_swin_denoiserep',
    'ade20k/segformer_mit-b0_8xb2-160k_ade20k-512x512_denoiserep',
    'cub200/swinv2-tiny-w8_8xb8_cub-256px_denoiserep',
    'flowers102/resnet50_8xb8_flowers102',
    'imagenet/deit-small_4xb256_in1k_denoiserep',
    'lazy/resnet18_8xb16_cifar10_denoiserep',
    'oxford-pets/resnet50_8xb8_oxford-iiit-pet_denoiserep',
    'reid/vit-small-p16_1xb64_market1501-256x128_denoiserep',
    *(name for name in NAMES if name.startswith('demo/')),
}
"""What goes the whole way in every test run: each library, architecture and format once. The others are slow."""


@dataclass(frozen=True)
class Format:
    """How the runs on a data set are made small, and what their evaluation must have measured.

    Attributes:
        batch: Images in the one step of training and of evaluation. Two show a classifier its first and last class.
        metrics: Figures of the evaluation.
        shrink: What the sizes of images in the pipelines are divided by.
        instances: Images of an identity in a batch, where the sampler sees to it; the evaluation needs all images then.
    """

    batch: int
    metrics: tuple[str, ...]
    shrink: int = 1
    instances: int = 0


CLASSES = ('ImageNet', 'CIFAR10', 'CUB', 'OxfordIIITPet', 'Flowers102', 'FashionMNIST')
IDENTITIES = ('Market1501', 'DukeMTMCReID', 'MSMT17', 'CUHK03', 'VehicleID')
FORMATS = {
    'CocoDataset': Format(1, ('coco/bbox_mAP',), shrink=4),
    'ADE20KDataset': Format(2, ('mIoU', 'aAcc', 'mBIoU'), shrink=4),
    'BaseSegDataset': Format(2, ('mIoU',)),
    **dict.fromkeys(CLASSES, Format(2, ('accuracy/top1',))),
    **dict.fromkeys(IDENTITIES, Format(8, ('reid/mAP', 'reid/rank1', 'reid/mINP'), instances=4)),
}
SIZES = ('scale', 'scales', 'crop_size', 'size')
"""Keys of pipelines and preprocessors that hold sizes of images."""
DETECTION = dict(score_thr=0.0, max_per_img=20, num=32)
"""Settings of detectors: fewer proposals, and no threshold, which random weights would not reach anywhere."""


@functools.cache
def read(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def load(name):
    return copy.deepcopy(read(name))


def control_of(name):
    return name.replace('_denoiserep', '_baseline_ft' if name.startswith('lazy/') else '_baseline-ft')


def baseline_of(control):
    return control.removesuffix('_baseline-ft').removesuffix('_baseline_ft')


def type_name(config):
    """Returns the name of a type without its module, '' where it is left to the default; lazy configs hold classes."""
    kind = config.get('type', '')
    return getattr(kind, '__name__', kind).split('.')[-1]


def whole_way(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def test_every_config_has_its_counterpart():
    assert DENOISED and {control_of(name) for name in DENOISED} == set(CONTROLS)
    assert set(NAMES) >= QUICK


@pytest.mark.parametrize('name', DENOISED)
def test_the_control_differs_in_denoising_only(name):
    ours, theirs = load(name).to_dict(), load(control_of(name)).to_dict()
    backbone = ours['model'].pop('backbone')
    assert type_name(backbone) == 'DenoiseRepBackbone'
    assert backbone['backbone'] == theirs['model'].pop('backbone')
    added = {'DenoiseLossHook', 'DenoiseFusionHook'}
    assert added <= {type_name(hook) for hook in ours['custom_hooks']}
    ours['custom_hooks'] = [hook for hook in ours['custom_hooks'] if type_name(hook) not in added]
    theirs['custom_hooks'] = theirs.get('custom_hooks') or []
    imports = [{*config.pop('custom_imports', {}).get('imports', [])} for config in (ours, theirs)]
    assert imports[0] | {'mmdenoiserep'} == imports[1] | {'mmdenoiserep'}
    assert ours['optim_wrapper']['paramwise_cfg']['custom_keys'].pop('.denoiser.')['decay_mult'] == 0
    theirs['optim_wrapper'].setdefault('paramwise_cfg', {}).setdefault('custom_keys', {})
    for config in (ours, theirs):
        config.pop('filename', None)
    assert ours == theirs


def code_lines(name):
    """Returns how often each line of a config occurs, without its docstring, comments, and lines that hold no word."""
    text = (CONFIGS / f'{name}.py').read_text()
    code = text.splitlines()[ast.parse(text).body[0].end_lineno :]  # the docstring is the first statement
    lines = map(str.strip, code)
    return Counter(line for line in lines if line.strip('()[]{},') not in ('', 'dict') and not line.startswith('#'))


def test_variants_inherit():
    """No two configs share ten lines of code: variants inherit from a sibling, and what several need is in _base_."""
    lines = {name: code_lines(name) for name in NAMES if not name.startswith('lazy/')}
    shared = {pair: (lines[pair[0]] & lines[pair[1]]).total() for pair in itertools.combinations(lines, 2)}
    assert not {pair: count for pair, count in shared.items() if count >= 10}


def released_checkpoints():
    checkpoints = {}
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        folder = Path(find_spec(library).origin).parent / '.mim/configs'
        for path in folder.rglob('meta*.y*ml'):
            content = yaml.load(path.read_text(), yaml.CSafeLoader)
            for model in content.get('Models', []) if isinstance(content, dict) else content:
                address = str(model.get('Weights')).strip().replace('//mmassets.onedl.ai/', '//download.openmmlab.com/')
                checkpoints[address] = Path(model.get('Config', '')).stem  # the fork has a mirror
    return checkpoints


def checkpoints_inside(config):
    """Yields the addresses in ``init_cfg`` and ``pretrained`` anywhere in a config."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key in ('checkpoint', 'pretrained') and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from checkpoints_inside(value)


def last_checkpoint(cfg):
    loop = cfg.train_cfg
    return f'epoch_{loop.max_epochs}.pth' if 'max_epochs' in loop else f'iter_{loop.max_iters}.pth'


def test_controls_start_from_trained_checkpoints():
    """``load_from`` is a released checkpoint, that of the base where it has one, or what our own baseline leaves."""
    released = released_checkpoints()
    assert len(released) > 100
    for name in CONTROLS:
        cfg = load(name)
        base = baseline_of(name)
        if cfg.load_from.startswith('https://'):
            assert cfg.load_from.startswith('https://download.openmmlab.com/'), name
            assert cfg.load_from in released, f'{name}: no metafile of the libraries names {cfg.load_from}'
            if Path(base).name in released.values():
                assert released[cfg.load_from] == Path(base).name, name
        else:
            assert base in BASELINES, f'{name}: nothing here trains {cfg.load_from}'
            assert Path(cfg.load_from).name == last_checkpoint(load(base)), name
            own = Path('work_dirs') / Path(base).name
            assert Path(cfg.load_from).parent in (own, Path('work_dirs/demo/baseline')), name
        assert not list(checkpoints_inside(cfg.model)), f'{name}: load_from brings these weights'


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('run')
    write_all(root)
    return root


@pytest.fixture
def case(data, monkeypatch):
    monkeypatch.chdir(data)
    for split_name in ('train_list', 'test_list'):  # mmpretrain knows the MD5 sums of the real files
        monkeypatch.setattr(CIFAR10, split_name, without_checksums(getattr(CIFAR10, split_name)))
    with runner_case() as case:
        yield case
    gc.collect()


@HOOKS.register_module()
class OneStep(Hook):
    """Keeps the state with which a run starts, makes one step at the full rate, without warm-up, and ends the run."""

    def before_train(self, runner):
        self.state = snapshot(inner(runner))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['lr'] = group['initial_lr']

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = True


def shrink(value, divisor):
    """Divides every size of images in a pipeline or preprocessor, in place."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value or ()):
        if key in SIZES:
            value[key] = divide(item, divisor)
        elif isinstance(item, dict | list | tuple):
            shrink(item, divisor)


def divide(size, divisor):
    return type(size)(divide(item, divisor) for item in size) if isinstance(size, list | tuple) else size // divisor


def replace_settings(config, values):
    for key, item in config.items():
        if key in values:
            config[key] = values[key]
        elif isinstance(item, dict):
            replace_settings(item, values)


def shorten(cfg, work_dir):
    """Makes a run as short as a run can be, in place: one step, one evaluation, one checkpoint."""
    kind = FORMATS[type_name(cfg.train_dataloader.dataset)]
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        loader.update(batch_size=kind.batch, num_workers=0, persistent_workers=False)
        if not kind.instances or part == 'train':
            loader.num_batch_per_epoch = 1
        shrink(loader.dataset, kind.shrink)
    if kind.instances:
        cfg.train_dataloader.sampler.num_ids = kind.batch // kind.instances
    shrink(cfg.model.get('data_preprocessor'), kind.shrink)
    cfg.train_cfg.val_interval = 1
    cfg.default_hooks.checkpoint.update(interval=1, save_optimizer=False)
    for key in ('train_cfg', 'test_cfg'):
        replace_settings(cfg.model.get(key) or {}, DETECTION)
    if type_name(cfg.optim_wrapper) == 'AmpOptimWrapper':  # it asserts a GPU
        cfg.optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype'):
            cfg.optim_wrapper.pop(key, None)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='OneStep')]
    cfg.visualizer.pop('name', None)  # visualizers of one name are one object, with the work dir of the first run
    cfg.randomness = dict(seed=0)
    cfg.work_dir = str(work_dir)


def build_vanilla(cfg):
    """Builds the model of a config without denoising, with BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(0)
    if cfg.get('default_scope'):  # not in lazy configs
        init_default_scope(cfg.default_scope)
    return randomise(MODELS.build(copy.deepcopy(cfg.model)))


def load_all(model, state):
    """Loads a state dict that has every name of the model and no other; not ``strict``, because SwinV2 drops some."""
    model.load_state_dict(state, strict=False)
    assert_equal(model.state_dict(), state)


def run(case, cfg, work_dir):
    """Trains for one step and evaluates; returns the model, its state before, the names that moved, and the log."""
    metrics = FORMATS[type_name(cfg.train_dataloader.dataset)].metrics
    shorten(cfg, work_dir)
    runner = case.build_runner(cfg)
    runner.train()
    log = {key: values.current() for key, values in runner.message_hub.log_scalars.items()}
    assert all(math.isfinite(value) for value in log.values()), log
    assert {f'val/{metric}' for metric in metrics} <= log.keys(), log
    model = inner(runner)
    before = next(hook for hook in runner.hooks if isinstance(hook, OneStep)).state
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    model.zero_grad()
    del runner
    gc.collect()  # it holds itself in cycles, and Adam's moments with it
    return model, before, moved, log


@pytest.mark.parametrize('name', whole_way(DENOISED))
def test_from_a_vanilla_checkpoint_to_a_fused_file(name, case, tmp_path):
    cfg, control = load(name), load(control_of(name))
    vanilla = build_vanilla(control)
    state = vanilla.state_dict()
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'vanilla.pth')
    cfg.load_from = str(tmp_path / 'vanilla.pth')

    model, before, moved, log = run(case, cfg, tmp_path / 'run')

    denoisers, others = split(before)
    zero = [value for key, value in denoisers.items() if not key.endswith('.down')]
    assert zero and not any(value.any() for value in zero), 'a denoiser starts as nothing'
    assert_equal(others, state)

    assert log['train/loss_denoise'] > 0
    trainable = {key for key, value in model.named_parameters() if is_denoiser(key) and value.requires_grad}
    downs = {key for key in trainable if key.endswith('.down')}  # they have no gradient while up is zero
    assert trainable - downs and trainable - downs == {key for key in moved if is_denoiser(key)} - downs
    assert any(key.startswith('backbone.') for key in moved - trainable)

    (fused,) = (tmp_path / 'run').glob('*_fused.pth')
    file = torch.load(fused, weights_only=True)['state_dict']
    load_all(vanilla, file)

    del before, denoisers, others, state, file
    ((_, backbone, record),) = find_records(model)
    randomise(backbone.double())
    plain = vanilla.backbone.double()
    load_all(plain, fuse_state_dict(backbone.state_dict()))
    image = torch.randn(record.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = verify_fusion(backbone, plain, image)
    assert result.ok, f'\n{result}'


@pytest.mark.parametrize('name', whole_way(BASELINES))
def test_a_baseline_trains(name, case, tmp_path):
    cfg = load(name)
    weights = {}
    if list(checkpoints_inside(cfg.model)):
        init = cfg.model.backbone.init_cfg
        weights = build_vanilla(cfg).backbone.state_dict()
        init.checkpoint = str(tmp_path / 'pretrained.pth')
        prefix = f'{init.prefix}.' if 'prefix' in init else ''
        torch.save(dict(state_dict={f'{prefix}{key}': value for key, value in weights.items()}), init.checkpoint)
    _, before, moved, _ = run(case, cfg, tmp_path / 'run')
    assert all(torch.equal(before[f'backbone.{key}'], value) for key, value in weights.items())
    assert any(key.startswith('backbone.') for key in moved)


@pytest.mark.parametrize(
    'name',
    [
        *(f'reid/vit-small-p16_1xb64_{data}-256x128' for data in ('market1501', 'dukemtmcreid', 'msmt17', 'cuhk03')),
        'reid/vit-base-p16_4xb56_vehicleid-256x256',
    ],
)
def test_identities_are_found_alike_before_and_after_fusing(name, case, tmp_path):
    cfg, control = load(f'{name}_denoiserep'), load(f'{name}_baseline-ft')
    for backbone in (cfg.model.backbone.backbone, control.model.backbone):
        backbone.arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    cfg.model.head.in_channels = control.model.head.in_channels = 16
    cfg.load_from = None
    cfg.custom_hooks.append(dict(type='Randomise'))
    model, _, _, log = run(case, cfg, tmp_path / 'run')
    (fused,) = (tmp_path / 'run').glob('*_fused.pth')

    vanilla = copy.deepcopy(control)
    shorten(vanilla, tmp_path / 'vanilla')
    vanilla.load_from = str(fused)
    found = case.build_runner(vanilla).val()
    assert found.keys() >= {'reid/mAP', 'reid/rank1', 'reid/mINP'}
    assert {key: log[f'val/{key}'] for key in found} == found

    plain = build_vanilla(control)
    load_all(plain, split(model.state_dict())[1])
    ((_, backbone, record),) = find_records(model)
    images = torch.randn(record.image_shape, generator=torch.Generator().manual_seed(0))
    assert not verify_fusion(backbone, plain.backbone, images).ok, 'the denoisers matter'


def test_batches_of_identities_are_whole():
    """``batch_size`` is P x K: the dataloader would cut the batches of the sampler otherwise."""
    loaders = {name: load(name).train_dataloader for name in NAMES}
    sampled = {name: loader for name, loader in loaders.items() if type_name(loader.get('sampler', {})) == 'PKSampler'}
    assert sampled
    for name, loader in sampled.items():
        assert loader.batch_size == loader.sampler.num_ids * loader.sampler.num_instances, name


@pytest.mark.parametrize('name', NAMES)
def test_what_it_is_is_said_and_the_data_is_where_its_library_expects_it(name):
    """So the tests above read the config's own path."""
    assert ast.get_docstring(ast.parse((CONFIGS / f'{name}.py').read_text()))
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert load(name)[key].dataset.data_root.rstrip('/') in WRITERS

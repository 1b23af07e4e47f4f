"""tools/train.py and tools/test.py within this process: resuming, other runners, and whose fault an error is."""

import argparse
import importlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, checkpoint

from helpers import ROOT
from mmdenoiserep.apis import errors
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.model import build_model
from mmdenoiserep.core import CheckpointError
from mmdenoiserep.engine.resume import allow_training_checkpoints
from tools_helpers import find_tool, python, run_tool, sentence

CONFIG = """
default_scope, custom_imports = 'mmpretrain', dict(imports=['mmdenoiserep'])
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=16), dict(type='PackInputs')]
data = dict(type='CustomDataset', data_root='images', pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=data, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = train_dataloader
vit = dict(type='VisionTransformer', img_size=16, patch_size=8, out_type='cls_token',
           arch=dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8))
model = dict(type='ImageClassifier', backbone=vit,
             head=dict(type='VisionTransformerClsHead', num_classes=2, in_channels=8, topk=(1,)))
data_preprocessor, test_cfg = dict(num_classes=2, mean=[127] * 3, std=[64] * 3), dict()
test_evaluator = dict(type='SingleLabelMetric', num_classes=2)
train_cfg, optim_wrapper = dict(by_epoch=True, max_epochs=1), dict(optimizer=dict(type='SGD', lr=0.0))
randomness = dict(seed=0)
"""
FLEXIBLE = """
runner_type, strategy = 'FlexibleRunner', dict(type='SingleDeviceStrategy')
env_cfg, default_hooks = dict(dist_cfg=dict(backend='gloo')), dict()
"""
WRAP = "model['backbone'] = dict(type='DenoiseRepBackbone', backbone=vit)\n"
HOOK = "custom_hooks = [dict(type='DenoiseLossHook'), dict(type='DenoiseFusionHook')]\n"
IMPORT = "custom_imports['imports'].append('mine')\n"
NUMBER = itertools.count()
OWN_NAMES = ['common', 'images', 'launch', 'calibrate', 'train', 'verify']
"""Modules of the user that are called as some of the tools are, or were."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder to work in, with images and a config; the process is left as it was."""
    allowed = torch.serialization.get_safe_globals()
    schemes, modules = dict(CheckpointLoader._schemes), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    generator = np.random.default_rng(0)
    for label in '01':
        Path('images', label).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(f'images/{label}/{i}.png', generator.integers(0, 255, (16, 16, 3), np.uint8))
    Path('config.py').write_text(CONFIG)
    yield tmp_path
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    CheckpointLoader._schemes = schemes
    for name in {'mine', *OWN_NAMES} & (set(sys.modules) - modules):
        del sys.modules[name]


def tool(name, *args, options=()):
    """Runs a tool whose runs have names of their own."""
    run_tool(name, *args, '--cfg-options', f'experiment_name=run{next(NUMBER)}', *options)


def refusal(name, *args, options=()):
    return sentence(name, *args, '--cfg-options', f'experiment_name=run{next(NUMBER)}', *options)


def weights(number=7.0, path='start.pth', **others):
    """Writes a checkpoint whose class token has one number, and returns its path."""
    state = build_model(load_config('config.py')).state_dict()
    state['backbone.cls_token'].fill_(number)
    torch.save(dict(meta={}, state_dict=state, **others), path)
    return path


def token(path):
    return torch.load(path, weights_only=False)['state_dict']['backbone.cls_token'].mean().item()


@pytest.mark.parametrize('runner', ['', FLEXIBLE])
def test_resume_from_the_first_start_on(runner):
    """The same command with --resume starts from load_from, goes on, and does so in a folder that was renamed."""
    Path('config.py').write_text(CONFIG + runner)
    start = [f'load_from={weights()}']
    tool('train', 'config.py', '--work-dir', 'a', '--resume', options=start)
    assert token('a/epoch_1.pth') == 7
    weights(1.0)
    tool('train', 'config.py', '--work-dir', 'a', '--resume', options=[*start, 'train_cfg.max_epochs=2'])
    assert token('a/epoch_2.pth') == 7
    shutil.move('a', 'b')
    tool('train', 'config.py', '--work-dir', 'b', '--resume', options=[*start, 'train_cfg.max_epochs=3'])
    assert token('b/epoch_3.pth') == 7
    meta = torch.load('b/epoch_3.pth', weights_only=False)['meta']
    assert meta['epoch'] == 3


def test_resume_from_an_address(monkeypatch):
    tool('train', 'config.py', '--work-dir', 'a', options=[f'load_from={weights()}'])
    asked = []

    def fetch(filename, map_location=None):
        asked.append(filename)
        return torch.load('a/epoch_1.pth', map_location, weights_only=False)

    CheckpointLoader.register_scheme('https://', fetch, force=True)
    address = 'https://example.org/epoch_1.pth'
    tool('train', 'config.py', '--work-dir', 'c', '--resume', address, options=['train_cfg.max_epochs=2'])
    assert asked == [address] and token('c/epoch_2.pth') == 7
    assert 'nowhere.pth' in refusal('train', 'config.py', '--resume', 'nowhere.pth')


@pytest.mark.parametrize('runner', ['', FLEXIBLE])
@pytest.mark.parametrize('others', [{}, dict(message_hub={}), dict(optimizer={})])
def test_weights_are_not_resumed(runner, others):
    Path('config.py').write_text(CONFIG + runner)
    for args, options in (['--resume', weights(**others)], []), ([], ['resume=True', 'load_from=start.pth']):
        said = refusal('train', 'config.py', '--work-dir', 'a', *args, options=options)
        assert 'load_from=start.pth' in said and 'KeyError' not in said


@pytest.mark.parametrize('runner', ['', FLEXIBLE])
def test_a_config_that_says_resume_is_tested(runner):
    Path('config.py').write_text(f'{CONFIG}{runner}resume = True\n')
    tool('test', 'config.py', weights(), '--work-dir', 't', '--out', 't.pkl')
    assert Path('t.pkl').stat().st_size > 100
    assert 'single-label/precision' in json.loads(next(Path('t').glob('*/*.json')).read_text().splitlines()[-1])


@pytest.mark.parametrize('runner', ['', FLEXIBLE])
@pytest.mark.parametrize(('name', 'args', 'options'), [('train', [], ['load_from=mae.pth']), ('test', ['mae.pth'], [])])
def test_weights_of_another_model(name, args, options, runner):
    Path('config.py').write_text(CONFIG + runner)
    torch.save({f'blocks.{i}.weight': torch.zeros(2) for i in range(9)}, 'mae.pth')
    said = refusal(name, 'config.py', *args, '--work-dir', 'w', options=options)
    assert 'blocks.0.weight' in said and 'backbone.cls_token' in said and 'mae.pth' in said


OWN = """
import torch
from mmcv.transforms import BaseTransform
from mmpretrain.datasets import CustomDataset
from mmpretrain.models import VisionTransformer
from mmpretrain.registry import DATASETS, MODELS, TRANSFORMS
def fail(here, kind):
    if here == {bug!r}:
        {slip}
fail('import', None)
@MODELS.register_module(force=True)
class Own(VisionTransformer):
    def __init__(self, **options):
        super().__init__(**options)
        fail('build', self)
    def forward(self, x):
        fail('forward', self)
        return super().forward(x)
@TRANSFORMS.register_module(force=True)
class OwnStep(BaseTransform):
    def transform(self, results):
        fail('transform', self)
        return results
@DATASETS.register_module(force=True)
class OwnData(CustomDataset):
    def load_data_list(self):
        fail('list', self)
        return super().load_data_list()
    def get_data_info(self, idx):
        fail('read', self)
        return super().get_data_info(idx)
"""
OWN_PARTS = "vit['type'], data['type'] = 'Own', 'OwnData'\npipeline.insert(1, dict(type='OwnStep'))\n"
BUGS = ('import', 'build', 'forward', 'transform', 'list', 'read')
SLIPS = {
    'undefined_name': NameError,
    'kind.undefined': AttributeError,
    "dict()['depth']": KeyError,
    'torch.zeros(2) @ torch.zeros(3)': RuntimeError,
}
RUNS = {
    'train': ['config.py', '--work-dir', 'w'],
    'test': ['config.py', 'start.pth', '--work-dir', 'w'],
    'calibrate': ['moments', 'config.py', 'start.pth', 'out.pth'],
    'visualize': ['config.py', 'start.pth', 'start.pth', '--out', 'figures', '--num-images', 2],
}
"""Arguments of the tools that run code of the user."""


@pytest.mark.parametrize('bug', BUGS)
@pytest.mark.parametrize('name', RUNS)
def test_a_bug_of_the_user_keeps_its_traceback(bug, name, folder):
    weights()
    Path('config.py').write_text(f'{CONFIG}{IMPORT}{OWN_PARTS}')
    for slip, kind in SLIPS.items():
        (folder / 'mine.py').write_text(OWN.format(bug=bug, slip=slip))
        importlib.invalidate_caches()
        sys.modules.pop('mine', None)
        with pytest.raises(kind) as caught:
            tool(name, *RUNS[name])
        lines = [str(entry.statement).strip() for entry in caught.traceback if Path(entry.path).name == 'mine.py']
        assert slip in lines, (slip, lines)
    assert not Path('out.pth').exists() and not Path('figures').exists()


READING_PROCESS = "train_dataloader['num_workers'] = test_dataloader['num_workers'] = 1\n"


@pytest.mark.parametrize('bug', ['transform', 'read'])
@pytest.mark.parametrize('name', ['train', 'test', 'calibrate'])
def test_a_bug_of_the_user_in_a_reading_process(bug, name, folder):
    """DataLoader passes such an error on with the traceback in its text."""
    weights()
    Path('config.py').write_text(f'{CONFIG}{IMPORT}{OWN_PARTS}{READING_PROCESS}')
    (folder / 'mine.py').write_text(OWN.format(bug=bug, slip='kind.undefined'))
    with pytest.raises(AttributeError, match=r'mine\.py", line \d+, in fail') as caught:
        tool(name, *RUNS[name])
    assert 'kind.undefined' in str(caught.value)


def test_an_error_of_a_library_in_a_reading_process_is_one_sentence():
    weights()
    Path('config.py').write_text(f"{CONFIG}pipeline[1]['scale'] = 'wide'\n{READING_PROCESS}")
    text = sentence('train', 'config.py', '--work-dir', 'w')
    assert 'the config config.py does not work (' in text and ', line ' in text and 'Traceback' not in text


@pytest.mark.parametrize('bug', ['build', 'transform'])
def test_an_installed_package_of_the_user_keeps_its_traceback(bug, folder, monkeypatch):
    """It registers classes and is none of the libraries."""
    weights()
    Path('config.py').write_text(f'{CONFIG}{IMPORT}{OWN_PARTS}')
    (folder / 'mine.py').write_text(OWN.format(bug=bug, slip='kind.undefined'))
    monkeypatch.setattr(errors.sysconfig, 'get_path', lambda kind: str(ROOT.parents[-1]))  # all is installed
    with pytest.raises(AttributeError, match='undefined'):
        tool('train', *RUNS['train'])


@pytest.mark.parametrize(('name', 'place'), [('mine', 'mine.py, line 1,'), ('nummpy', 'the config config.py')])
def test_a_missing_module_is_named_with_the_file_that_imports_it(name, place, folder):
    (folder / 'mine.py').write_text('import nummpy\n')
    Path('config.py').write_text(f"{CONFIG}custom_imports['imports'].append('{name}')\n")
    text = sentence('train', 'config.py', '--work-dir', 'w')
    assert f'{place} needs nummpy, which is neither installed nor on PYTHONPATH' in text and 'pip' not in text


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ("vit['type'] = 'VisionTransfromer'", 'VisionTransfromer'),
        ("vit['depht'] = 3", 'depht'),
        ("del vit['type']", 'type'),
        ("del vit['arch']['num_heads']", 'num_heads'),
        ('del model', 'model'),
        ("data['type'] = 'CustomDatasets'", 'CustomDatasets'),
        ("pipeline[1]['type'] = 'Resise'", 'Resise'),
        ("del pipeline[1]['scale']", 'scale'),
        ("data['data_root'] = 'nowhere'", 'nowhere'),
        ("custom_imports['imports'].append('nowhere')", 'nowhere'),
        ("_base_ = './nowhere.py'", 'nowhere.py'),
        ('more = dict(', 'config.py'),
    ],
)
@pytest.mark.parametrize('name', RUNS)
def test_a_mistake_in_the_config_is_a_sentence(name, change, words):
    weights()
    Path('config.py').write_text(f'{CONFIG}{change}\n')
    assert words in refusal(name, *RUNS[name])
    assert not Path('out.pth').exists() and not Path('figures').exists()


@pytest.mark.parametrize('missing', ['config.py', 'start.pth'])
@pytest.mark.parametrize('name', RUNS)
def test_a_missing_file_is_a_sentence(name, missing):
    weights()
    Path(missing).unlink()
    args = [*RUNS[name], '--resume', 'start.pth'] if name == 'train' else RUNS[name]
    assert missing in refusal(name, *args)


@pytest.mark.parametrize(
    ('args', 'options', 'words'),
    [
        ([], ['optim_wrapper.optimizer.type=SGDD'], 'config.py'),
        ([], ['train_dataloader.sampler.type=DefaultSample'], 'config.py'),
        (['--launcher', 'pytorch'], [], 'needs RANK in the environment'),
        (['--launcher', 'slurm'], [], 'needs SLURM_PROCID in the environment'),
        (['--amp'], ['optim_wrapper=None'], 'the config config.py has no optim_wrapper'),
        (['--auto-scale-lr'], ['auto_scale_lr=None'], 'has no auto_scale_lr.base_batch_size'),
        ([], ['randomness.seed.x=1'], 'the options do not fit'),
        ([], ['work_dir=[1,'], 'the options cannot be read'),
        ([], ['train_dataloader.dataset.pipeline.99.type=X'], 'the options do not fit'),
    ],
)
def test_a_training_that_cannot_begin_ends_in_one_sentence(args, options, words):
    assert words in refusal('train', 'config.py', '--work-dir', 'w', *args, options=options)


def test_denoisers_and_their_hook_need_each_other():
    Path('config.py').write_text(CONFIG + HOOK)
    assert 'found no denoised layer in the model' in refusal('train', 'config.py', '--work-dir', 'w')
    Path('config.py').write_text(CONFIG + WRAP)
    with pytest.raises(RuntimeError, match='add custom_hooks'):
        tool('train', 'config.py', '--work-dir', 'w')


OUTER = """
import torch
from mmengine.registry import MODELS
@MODELS.register_module(force=True)
class Outer(torch.nn.Module):
    def __init__(self, detector, data_preprocessor=None):
        super().__init__()
        self.detector = MODELS.build(dict(detector, data_preprocessor=data_preprocessor))
        self.data_preprocessor = self.detector.data_preprocessor
"""


def test_a_backbone_within_another_model_is_calibrated(folder):
    start = torch.load(weights(), weights_only=True)['state_dict']
    (folder / 'mine.py').write_text(OUTER)
    Path('config.py').write_text(f"{CONFIG}{IMPORT}model = dict(type='Outer', detector=model)\n")
    wrap = "model['detector']['backbone'] = dict(type='DenoiseRepBackbone', backbone=vit)\n"
    Path('den.py').write_text(Path('config.py').read_text() + wrap)
    state = {f'detector.{key}': value for key, value in start.items()}
    torch.save(dict(meta=dict(cfg=Config.fromfile('den.py').pretty_text), state_dict=state), 'outer.pth')
    tool('calibrate', 'moments', 'config.py', 'outer.pth', 'moments.pth', '--images', 'images')
    fit = ['--source', 'moments.pth', '--images', 'images']
    for path in Path('images').rglob('*.png'):
        cv2.imwrite(str(path), 255 - cv2.imread(str(path)) // 2)
    tool('calibrate', 'domain', 'config.py', 'outer.pth', 'fitted.pth', *fit)
    fitted = torch.load('fitted.pth', weights_only=True)
    assert fitted['state_dict'].keys() == state.keys()
    assert not torch.equal(
        fitted['state_dict']['detector.backbone.patch_embed.projection.weight'],
        state['detector.backbone.patch_embed.projection.weight'],
    )
    vanilla = Config.fromstring(fitted['meta']['cfg'], '.py')
    assert vanilla.model.detector.backbone.type == 'VisionTransformer'
    torch.save(state, 'bare.pth')
    tool('calibrate', 'domain', 'den.py', 'bare.pth', 'again.pth', *fit)
    again = torch.load('again.pth', weights_only=True)
    assert all(torch.equal(value, again['state_dict'][key]) for key, value in fitted['state_dict'].items())
    assert Config.fromstring(again['meta']['cfg'], '.py').model == vanilla.model
    assert 'does not fit' in refusal('calibrate', 'moments', 'config.py', 'start.pth', 'x.pth', '--images', 'images')


def test_weights_under_a_key_become_a_checkpoint():
    path = weights(3.0, student=dict(w=torch.zeros(1)), args=dict(lr=1))
    content = torch.load(path, weights_only=True)
    content['run'] = dict(teacher={f'module.{key}': value for key, value in content.pop('state_dict').items()})
    content['other'] = dict(w=torch.zeros(1))
    torch.save(content, 'released.pth')
    plain = ['plain', 'released.pth', 'out.pth']
    run_tool('convert_checkpoint', *plain, '--key', 'run.teacher')
    Path('out.pth').rename('kept.pth')
    assert 'student, other' in sentence('convert_checkpoint', *plain)
    with pytest.raises(SystemExit, match='2'):
        run_tool('convert_checkpoint', 'vmamba', *plain[1:], '--key', 'a')
    tool('train', 'config.py', '--work-dir', 'a', options=['load_from=kept.pth'])
    assert token('a/epoch_1.pth') == 3


def test_the_command_is_not_a_package_of_that_name(folder, monkeypatch, capsys):
    """denoiserep-test runs tools/test.py where Python's own package "test" was imported, or comes first."""
    (folder / 'test').mkdir()
    (folder / 'test/__init__.py').write_text('')
    (folder / 'test/__main__.py').write_text('print("the tests of Python")')
    monkeypatch.setitem(sys.modules, 'test', importlib.import_module('test'))
    monkeypatch.setattr(sys, 'argv', [str(folder / 'denoiserep-test'), '--help'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module('denoiserep_commands').main()
    assert caught.value.code == 0 and 'Evaluates a checkpoint' in capsys.readouterr().out


CLASSES = """
import dataclasses, enum
from collections import namedtuple
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS
Label = namedtuple('Label', ['name', 'id'])
class Side(enum.Enum):
    LEFT = 1
@dataclasses.dataclass
class Camera:
    bands: int
@DATASETS.register_module(force=True)
class Mine(CustomDataset):
    METAINFO = dict(classes=('a', 'b'), labels=[Label('a', 0)], side=Side.LEFT, camera=Camera(3))
"""


def test_plain_classes_of_the_user_in_the_metainfo(folder):
    (folder / 'mine.py').write_text(CLASSES)
    Path('config.py').write_text(f"{CONFIG}{IMPORT}data['type'] = 'Mine'\n{HOOK}{WRAP}")
    tool('train', 'config.py', '--work-dir', 'a')
    meta = torch.load('a/epoch_1_fused.pth', weights_only=True)['meta']['dataset_meta']
    assert meta == dict(classes=('a', 'b'))
    tool('train', 'config.py', '--work-dir', 'a', '--resume', options=['train_cfg.max_epochs=2'])
    again = torch.load('a/epoch_2.pth', weights_only=False)['meta']['dataset_meta']
    assert again['labels'][0].name == 'a' and again['camera'].bands == 3 and again['side'].value == 1


@pytest.mark.parametrize('how', ['script', 'command'])
def test_own_modules_called_as_those_of_the_tools(how, folder):
    for name in OWN_NAMES:
        (folder / f'{name}.py').write_text(f'print("the user\'s own {name}")\n')
    Path('config.py').write_text(f"{CONFIG}custom_imports['imports'] += {OWN_NAMES}\n{WRAP}")
    command = "import sys, denoiserep_commands as c; sys.argv[0] = 'denoiserep-print-targets'; c.main()"
    script = [find_tool('print_targets')] if how == 'script' else ['-c', command]
    printed = python(*script, 'config.py', cwd=folder, env=dict(PYTHONPATH=folder))
    assert all(f"the user's own {name}" in printed for name in OWN_NAMES) and 'layers denoised' in printed


def test_what_lies_at_an_address_runs_no_code(folder, monkeypatch):

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / 'ran'),)

    torch.save(dict(state_dict=dict(w=torch.ones(2)), args=Evil()), 'evil.pth')
    torch.save(dict(model=dict(w=torch.ones(2)), args=argparse.Namespace(lr=1)), 'good.pth')
    Path('page.pth').write_text('<html>Sign in</html>')
    Path('hub').mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(folder / 'hub'))
    monkeypatch.setattr(checkpoint, 'load_url', checkpoint.load_url)
    monkeypatch.setattr(checkpoint, 'get_torchvision_models', lambda: dict(good=f'{folder.as_uri()}/good.pth'))
    fetched = []
    fetch = torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *a, **k: fetched.append(a[0]) or fetch(*a, **k))
    allow_training_checkpoints()
    for _ in range(2):
        assert 'w' in CheckpointLoader.load_checkpoint('torchvision://good')['model']
    assert len(fetched) == 1
    for name, words in dict(evil='running code', page='web page').items():
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load_from_http(f'{folder.as_uri()}/{name}.pth')
    assert not (folder / 'ran').exists()

"""Fusing with --verify and printing targets, in this process, for models of many kinds."""

import copy
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from hardening_helpers import as_config, run
from helpers import randomise
from mmdenoiserep.core.files import fused
from mmdenoiserep.core.method.record import find_records
from tiny_models import LORA, RESNET, VIT, classifier, semi, wrapped
from tools_helpers import run_tool

WRITES = """
import torch
from mmengine.registry import MODELS

@MODELS.register_module(force=True)
class Writing(torch.nn.Module):
    'Sets what its config must not have, as DINO does with its head, and takes out what it has used.'
    def __init__(self, backbone, head, data_preprocessor=None):
        super().__init__()
        assert 'in_channels' not in head, 'users should not set in_channels'
        head['in_channels'] = 8
        self.backbone = MODELS.build(backbone)
        self.head = torch.nn.Linear(head['in_channels'], head.pop('classes'))
        backbone['type'] = 'Gone'

@MODELS.register_module(force=True)
class Masking(torch.nn.Module):
    'Hides half of the image at random, in eval mode too, and returns an object.'
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x):
        hidden = torch.rand_like(x[:, :1]) > 0.5
        result = type('Result', (), {})()
        result.features = self.fc(self.conv(x * hidden).mean((2, 3)))
        return result

@MODELS.register_module(force=True)
class Silent(Masking):
    'Returns nothing.'
    def forward(self, x):
        super().forward(x)

@MODELS.register_module(force=True)
class Failing(Masking):
    'Has a bug that shows on two images only.'
    def forward(self, x):
        return super().forward(x) if len(x) == 1 else undefined_name
"""


def write(folder, model, scope='mmpretrain', edit=lambda state: state):
    """Writes a config and a checkpoint with random denoisers, and returns both paths."""
    (folder / 'verify_models.py').write_text(WRITES)
    cfg = {'default_scope': scope, 'custom_imports': {'imports': ['mmdenoiserep', 'verify_models']}, 'model': model}
    path = folder / 'config.py'
    path.write_text(as_config(cfg))
    config = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(copy.deepcopy(config.model))
    for parameter in built.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    randomise(built)
    for name, parameter in built.named_parameters():  # those of frozen layers stay zero
        if '.denoiser.' in name and not parameter.requires_grad and not name.endswith('.down'):
            parameter.data.zero_()
    torch.save({'meta': {}, 'state_dict': edit(built.state_dict())}, folder / 'in.pth')
    return path, folder / 'in.pth', built


MODEL_KINDS = {
    'writes into its config': ({'type': 'Writing', 'backbone': wrapped(VIT, image_size=16), 'head': {'classes': 3}},),
    'masks at random': ({'type': 'Writing', 'backbone': wrapped({'type': 'Masking'}), 'head': {'classes': 3}},),
    'soft teacher': (semi(wrapped(RESNET)), 'mmdet'),
    'lora': (classifier(wrapped(LORA, image_size=16)),),
    'beit with a mask': (classifier(wrapped({**VIT, 'type': 'BEiTPretrainViT', 'out_type': 'raw'}, image_size=16)),),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose module of models can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'verify_models', raising=False)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize('kind', MODEL_KINDS)
def test_verify(kind, folder):
    config, checkpoint, model = write(folder, *MODEL_KINDS[kind])
    assert run('fuse_checkpoint', checkpoint, folder / 'out.pth', '--verify', config) is None
    state = torch.load(folder / 'out.pth', weights_only=True)['state_dict']
    names = [name for name, _, _ in find_records(model)]
    assert names == (['student.backbone', 'teacher.backbone'] if kind == 'soft teacher' else [names[0]])
    assert state and not any('.denoiser.' in key for key in state)


def test_a_wrong_fusion_is_found(folder, monkeypatch):
    def vanilla(state):
        return type(state)((key, value) for key, value in state.items() if '.denoiser.' not in key), {}

    monkeypatch.setattr(fused, 'fuse_with_changes', vanilla)
    for kind in ('lora', 'masks at random'):
        config, checkpoint, _ = write(folder, *MODEL_KINDS[kind])
        message = run('fuse_checkpoint', checkpoint, folder / 'out.pth', '--verify', config)
        assert 'differ beyond the tolerance' in message
        assert not (folder / 'out.pth').exists()


def writing(kind, **options):
    return {'type': 'Writing', 'backbone': wrapped({'type': kind}, **options), 'head': {'classes': 3}}


@pytest.mark.parametrize(
    ('model', 'words'),
    [(writing('Silent'), 'no floating-point tensor'), (writing('Masking', image_size=2), 'image_size')],
    ids=['nothing to compare', 'images too small'],
)
def test_backbones_that_cannot_be_compared(model, words, folder):
    config, checkpoint, _ = write(folder, model)
    assert words in run('fuse_checkpoint', checkpoint, folder / 'out.pth', '--verify', config)
    assert not (folder / 'out.pth').exists()


def test_a_bug_of_the_users_keeps_its_traceback(folder):
    config, checkpoint, _ = write(folder, writing('Failing'))
    with pytest.raises(NameError, match='undefined_name'):
        run('fuse_checkpoint', checkpoint, folder / 'out.pth', '--verify', config)


@pytest.mark.parametrize(
    ('model', 'scope', 'layers', 'counts'),
    [
        (classifier(VIT), 'mmpretrain', 'ffn', [2]),
        (classifier(wrapped(VIT, image_size=16)), 'mmpretrain', 'ffn', [2]),
        (semi(RESNET), 'mmdet', 'layer1', [4]),
        (semi(wrapped(RESNET)), 'mmdet', 'layer1', [4]),
        ({'type': 'X', 'backbone': RESNET, 'teacher_backbone': {**RESNET, 'depth': 34}}, 'mmdet', 'layer1', [4, 6]),
        ({'type': 'X', 'backbone': RESNET, 'teacher_backbone': wrapped(RESNET)}, 'mmdet', 'layer1', [4]),
        (classifier({**LORA, 'module': wrapped(VIT, image_size=16)}), 'mmpretrain', 'ffn', [2]),
    ],
    ids=['vanilla', 'denoised', 'semi', 'denoised semi', 'two', 'one of two', 'lora'],
)
def test_print_targets(model, scope, layers, counts, tmp_path, capsys):
    (tmp_path / 'config.py').write_text(as_config({'default_scope': scope, 'model': model}))
    run_tool('print_targets', tmp_path / 'config.py', '--targets', f'.*{layers}.*')
    printed = capsys.readouterr().out
    assert [int(line.split()[0]) for line in printed.splitlines() if ' layers denoised' in line] == counts
    assert ('model.teacher_backbone: ' in printed) == (len(counts) == 2)


def test_print_targets_without_a_backbone(tmp_path):
    (tmp_path / 'config.py').write_text("model = dict(type='TimmClassifier', model_name='resnet18')\n")
    assert 'no backbone' in run('print_targets', tmp_path / 'config.py')

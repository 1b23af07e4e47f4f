"""Deployment of fused models: tools/export_onnx.py as a user meets it, torch.export, int8."""

from copy import deepcopy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import mmdenoiserep  # noqa: F401
from helpers import ROOT, randomise, relative
from mmdenoiserep import apply_denoiserep, fuse_checkpoint, fuse_model
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.export import Deployed, largest_difference
from mmdenoiserep.apis.model import build_model
from tools_helpers import run_tool, sentence

DEMO = ROOT / 'configs/demo'
SIDES = {'segformer_mit_scenes': 64, 'mask-rcnn_swin_scenes': 64}


def build(config):
    torch.manual_seed(0)
    return randomise(build_model(load_config(config)))


def images_of(name, batch):
    side = SIDES.get(name, 28)
    return torch.randn(batch, 1 if side == 28 else 3, side, side, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Gives the vanilla model, the denoised one and the path of its fused checkpoint, by the name of a config."""
    folder, known = tmp_path_factory.mktemp('models'), {}

    def get(name):
        if name not in known:
            vanilla = build(DEMO / f'{name}.py')
            denoised = deepcopy(vanilla)
            apply_denoiserep(denoised.backbone, 'all', example_input=images_of(name, 1))
            randomise(denoised)
            torch.save(dict(state_dict=denoised.state_dict()), folder / f'{name}.pth')
            fuse_checkpoint(folder / f'{name}.pth', folder / f'{name}_fused.pth')
            torch.save(dict(state_dict=vanilla.state_dict()), folder / f'{name}_vanilla.pth')
            known[name] = vanilla, denoised, folder / f'{name}_fused.pth'
        return known[name]

    return get


def run(model, name, images):
    """Returns what is deployed of a model, computed by torch, as a list."""
    with torch.no_grad():
        output = model.extract_feat(images) if 'rcnn' in name else model(images, mode='tensor')
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize(
    ('name', 'dynamic'),
    [
        ('vit_fashion-mnist', True),
        ('resnet_fashion-mnist', True),
        ('swin_fashion-mnist', False),
        ('segformer_mit_scenes', True),
        ('mask-rcnn_swin_scenes', False),
    ],
)
def test_onnxruntime_gives_what_the_denoised_model_gives(name, dynamic, models, tmp_path, capsys):
    vanilla, denoised, fused = models(name)
    side = SIDES.get(name, 28)
    options = ['--size', side, side, *(['--dynamic-batch'] if dynamic else [])]
    run_tool('export_onnx', DEMO / f'{name}.py', fused, tmp_path / 'out.onnx', *options)
    shown = capsys.readouterr().out
    assert 'out.onnx' in shown and [f'{n} images: ' in shown for n in (1, 2, 3)] == [True, dynamic, dynamic]
    session = onnxruntime.InferenceSession(tmp_path / 'out.onnx', providers=['CPUExecutionProvider'])
    for batch in (1, 2, 5) if dynamic else (1,):
        images = images_of(name, batch)
        outputs = session.run(None, dict(images=images.numpy()))
        assert len(outputs) == (5 if 'rcnn' in name else 1)
        expected, other = run(denoised, name, images), run(vanilla, name, images)
        for actual, e, o in zip(outputs, expected, other, strict=True):
            assert relative(torch.from_numpy(actual), e) < 1e-4 and relative(o, e) > 1e-2
    assert list(tmp_path.iterdir()) == [tmp_path / 'out.onnx']


def test_the_graph_is_that_of_the_vanilla_model(models, tmp_path):
    *_, fused = models('vit_fashion-mnist')
    graphs = []
    for path in (fused, Path(str(fused).replace('_fused', '_vanilla'))):
        run_tool('export_onnx', DEMO / 'vit_fashion-mnist.py', path, tmp_path / path.with_suffix('.onnx').name)
        graph = onnx.load(tmp_path / path.with_suffix('.onnx').name).graph
        constants = [(value.name, value.data_type, tuple(value.dims)) for value in graph.initializer]
        graphs.append(([node.op_type for node in graph.node], constants))
    assert graphs[0] == graphs[1] and len(graphs[0][1]) > 30


def test_a_swin_with_a_dynamic_batch_is_refused(models, tmp_path):
    """Its exported graph remembers the batch that it was traced with, and would be silently wrong for others."""
    *_, fused = models('swin_fashion-mnist')
    message = sentence('export_onnx', DEMO / 'swin_fashion-mnist.py', fused, tmp_path / 'out.onnx', '--dynamic-batch')
    assert 'swin_fashion-mnist.py cannot be exported with a dynamic batch' in message
    assert 'onnxruntime differs from torch by' in message
    assert not list(tmp_path.iterdir())


PYRAMID = """
default_scope = 'mmseg'
norm = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor'),
    backbone=dict(type='ResNet', depth=18, base_channels=8, norm_cfg=norm),
    decode_head=dict(type='PSPHead', in_channels=64, in_index=3, channels=8, num_classes=3, norm_cfg=norm))
"""


def test_what_one_exporter_lacks_the_other_has(tmp_path, capfd):
    config, checkpoint = tmp_path / 'psp.py', tmp_path / 'psp.pth'
    config.write_text(PYRAMID)
    torch.save(dict(state_dict=build(config).state_dict()), checkpoint)
    before = sorted(tmp_path.iterdir())
    message = sentence('export_onnx', config, checkpoint, tmp_path / 'out.onnx', '--size', 64, 64)
    assert 'psp.py cannot be exported for one image (3, 64, 64)' in message and 'adaptive_avg_pool2d' in message
    assert 'graph(' not in ''.join(capfd.readouterr()) and sorted(tmp_path.iterdir()) == before
    run_tool('export_onnx', config, checkpoint, tmp_path / 'out.onnx', '--size', 64, 64, '--dynamo')
    (output,) = onnx.load(tmp_path / 'out.onnx').graph.output
    assert [size.dim_value for size in output.type.tensor_type.shape.dim] == [1, 3, 2, 2]


def test_bad_input_ends_in_one_sentence(models, tmp_path):
    config = DEMO / 'vit_fashion-mnist.py'
    *_, fused = models('vit_fashion-mnist')
    unfused = Path(str(fused).replace('_fused', ''))
    output, taken = tmp_path / 'out.onnx', tmp_path / 'taken.onnx'
    taken.write_text('mine')
    for words, *args in (
        (f'tools/fuse_checkpoint.py {unfused} ', config, unfused, output),
        ('does not exist', config, tmp_path / 'none.pth', output),
        ('does not fit', DEMO / 'resnet_fashion-mnist.py', fused, output),
        ('must end with .onnx', config, fused, tmp_path / 'out.pth'),
        ('exists', config, fused, taken),
    ):
        assert words in sentence('export_onnx', *args)
    assert list(tmp_path.iterdir()) == [taken] and taken.read_text() == 'mine'


def test_a_slip_in_the_model_of_the_user_keeps_its_traceback(tmp_path):
    (tmp_path / 'config.py').write_text(
        "default_scope = 'mmpretrain'\nmodel = dict(type='ImageClassifier', backbone=dict(type='OwnSlip'))\n"
    )
    torch.save(dict(state_dict=MODELS.build(dict(type='OwnSlip')).state_dict(prefix='backbone.')), tmp_path / 'c.pth')
    words = [tmp_path / 'config.py', tmp_path / 'c.pth', tmp_path / 'out.onnx']
    assert 'cannot be exported' in sentence('export_onnx', *words, '--size', 8, 8)
    with pytest.raises(AttributeError, match='scael'):
        run_tool('export_onnx', *words, '--size', 16, 16)
    assert not (tmp_path / 'out.onnx').exists()


@MODELS.register_module()
class OwnSlip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return (self.scael if x.shape[-1] == 16 else torch.special.i0(self.conv(x)),)


def test_differences_are_over_the_largest_output():
    outputs = [torch.tensor([1.0, -4.0]), torch.tensor([100.0])]
    assert largest_difference(outputs, outputs) == 0
    assert largest_difference([outputs[0] + 0.5, outputs[1] + 1], outputs) == 0.125
    assert largest_difference([outputs[0], outputs[1] * torch.nan], outputs) > 1e9


@pytest.mark.parametrize(
    'name', ['vit_fashion-mnist', 'resnet_fashion-mnist', 'swin_fashion-mnist', 'segformer_mit_scenes']
)
def test_torch_export_of_the_fused_model_is_that_of_the_vanilla_one(name, models):
    vanilla, denoised, _ = models(name)
    images = images_of(name, 2)
    programs = [torch.export.export(Deployed(model), (images,)) for model in (fuse_model(denoised), vanilla)]
    operators = [[str(node.target) for node in p.graph.nodes if node.op == 'call_function'] for p in programs]
    assert operators[0] == operators[1] and len(operators[0]) > 20
    shapes = [{key: (value.shape, value.dtype) for key, value in p.state_dict.items()} for p in programs]
    assert shapes[0] == shapes[1] and not any('denoiser' in key for key in shapes[0])
    with torch.no_grad():
        outputs = [p.module()(images)[0] for p in programs]
    (expected,) = run(denoised, name, images)
    assert relative(outputs[0], expected) < 1e-4 and relative(outputs[1], expected) > 1e-2

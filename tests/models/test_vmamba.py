"""VMamba against a naive forward, under the names of the released files, and with denoisers."""

import math
import re
import sys
import types

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from engine_helpers import message
from helpers import randomise, relative
from mmdenoiserep.core import DenoiseLinear, apply_denoiserep, fuse_model, verify_fusion
from mmdenoiserep.engine.resume import allow_training_checkpoints
from mmdenoiserep.models import selective_scan, vmamba
from mmdenoiserep.models.vmamba import DropPath, VMamba
from tools_helpers import run_tool, sentence

SMALL = dict(dims=(24, 40), depths=(1, 2), ssm_ratio=1.5)
FOUR_STAGES = dict(dims=(16, 32, 64, 128), depths=(1, 1, 2, 1), ssm_ratio=2.0)
LINEAR = r'.*(op\.in_proj|op\.out_proj|mlp\.fc1|mlp\.fc2)'


def build(arch=SMALL, dtype=torch.float64, **options):
    """A model of which every parameter matters."""
    options = {'out_indices': tuple(range(len(arch['depths']))), **options}
    torch.manual_seed(0)
    model = VMamba(arch, **options).to(dtype)
    for name, parameter in model.named_parameters():
        scale = 1 if 'A_logs' in name or 'dt_projs' in name else 0.1
        parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def image(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def released(dims, depths, ssm_ratio):
    """Names and shapes in a released classifier."""

    def affine(name, channels):
        return {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}

    half, last = dims[0] // 2, dims[-1]
    shapes = affine('patch_embed.0', half) | affine('patch_embed.2', half) | affine('patch_embed.5', dims[0])
    shapes |= affine('patch_embed.7', dims[0]) | affine('classifier.norm', last) | affine('classifier.head', 1000)
    shapes['patch_embed.0.weight'] = (half, 3, 3, 3)
    shapes['patch_embed.5.weight'] = (dims[0], half, 3, 3)
    shapes['classifier.head.weight'] = (1000, last)
    for s, (c, depth) in enumerate(zip(dims, depths, strict=True)):
        inner, rank = int(ssm_ratio * c), -(-c // 16)
        block = affine('norm', c) | affine('norm2', c) | affine('op.out_norm', inner)
        block |= affine('mlp.fc1', 4 * c) | affine('mlp.fc2', c)
        block |= {
            'op.x_proj_weight': (4, rank + 2, inner),
            'op.A_logs': (4 * inner, 1),
            'op.Ds': (4 * inner,),
            'op.dt_projs_weight': (4, inner, rank),
            'op.dt_projs_bias': (4, inner),
            'op.in_proj.weight': (inner, c),
            'op.conv2d.weight': (inner, 1, 3, 3),
            'op.out_proj.weight': (c, inner),
            'mlp.fc1.weight': (4 * c, c),
            'mlp.fc2.weight': (c, 4 * c),
        }
        shapes |= {f'layers.{s}.blocks.{j}.{name}': shape for j in range(depth) for name, shape in block.items()}
        if s < len(dims) - 1:
            down = f'layers.{s}.downsample'
            shapes |= affine(f'{down}.1', dims[s + 1]) | affine(f'{down}.3', dims[s + 1])
            shapes[f'{down}.1.weight'] = (dims[s + 1], c, 3, 3)
    return shapes


TINY, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)


@pytest.mark.parametrize(
    ('name', 'dims', 'depths', 'ssm_ratio', 'with_classifier', 'without'),
    [
        ('tiny', TINY, (2, 2, 8, 2), 1.0, 30_249_064, 29_478_528),
        (None, TINY, (2, 2, 5, 2), 2.0, 30_705_832, 29_935_296),
        ('small', TINY, (2, 2, 15, 2), 2.0, 50_147_752, 49_377_216),
        (None, TINY, (2, 2, 20, 2), 1.0, 49_012_840, 48_242_304),
        ('base', BASE, (2, 2, 15, 2), 2.0, 88_557_800, 87_530_752),
        (None, BASE, (2, 2, 20, 2), 1.0, 86_614_504, 85_587_456),
    ],
)
def test_names_shapes_and_totals_are_the_published_ones(name, dims, depths, ssm_ratio, with_classifier, without):
    arch = dict(dims=dims, depths=depths, ssm_ratio=ssm_ratio)
    with torch.device('meta'):
        model, same = VMamba(arch), VMamba(name or arch)
    expected = released(**arch)
    assert sum(map(math.prod, expected.values())) == with_classifier
    for key in ('weight', 'bias'):
        del expected[f'classifier.head.{key}']
        expected[f'outnorm3.{key}'] = expected.pop(f'classifier.norm.{key}')
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected == {key: tuple(value.shape) for key, value in same.state_dict().items()}
    backbone = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('outnorm'))
    assert backbone == without
    assert not list(model.buffers())


def layer_norm(x, weight, bias):
    """Over the channels of (B, C, H, W)."""
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return x * weight[:, None, None] + bias[:, None, None]


def linear(x, weight, bias=None):
    y = torch.einsum('oc,bchw->bohw', weight, x)
    return y if bias is None else y + bias[:, None, None]


def scan(x, p):
    """Four walks over the pixels of (B, C, H, W); each pixel gets the sum of what they say there."""
    height, width = x.shape[2:]
    by_rows = [(i, j) for i in range(height) for j in range(width)]
    by_columns = [(i, j) for j in range(width) for i in range(height)]
    channels, rank = p['dt_projs_weight'].shape[1:]
    A, D = (-p['A_logs'].exp()).reshape(4, channels), p['Ds'].reshape(4, channels)
    y = torch.zeros_like(x)
    for k, path in enumerate([by_rows, by_columns, by_rows[::-1], by_columns[::-1]]):
        h = torch.zeros_like(x[:, :, 0, 0])
        for i, j in path:
            u = x[:, :, i, j]
            projected = u @ p['x_proj_weight'][k].T
            low_rank, B, C = projected[:, :rank], projected[:, rank, None], projected[:, rank + 1, None]
            step = (1 + (low_rank @ p['dt_projs_weight'][k].T + p['dt_projs_bias'][k]).exp()).log()
            h = (step * A[k]).exp() * h + step * B * u
            y[:, :, i, j] += C * h + D[k] * u
    return y


def naive(model, x, depths):
    """The whole forward, channel first."""
    state = dict(model.named_parameters())

    def part(prefix):
        return {key.removeprefix(prefix): p for key, p in state.items() if key.startswith(prefix)}

    def parameters(name):
        return [state[f'{name}.{key}'] for key in ('weight', 'bias')]

    x = F.conv2d(x, *parameters('patch_embed.0'), stride=2, padding=1)
    x = F.gelu(layer_norm(x, *parameters('patch_embed.2')))
    x = layer_norm(F.conv2d(x, *parameters('patch_embed.5'), stride=2, padding=1), *parameters('patch_embed.7'))
    outputs = []
    for s, depth in enumerate(depths):
        for j in range(depth):
            name = f'layers.{s}.blocks.{j}.'
            op = part(name + 'op.')
            u = linear(layer_norm(x, *parameters(name + 'norm')), op['in_proj.weight'])
            u = F.silu(F.conv2d(u, op['conv2d.weight'], padding=1, groups=u.shape[1]))
            u = layer_norm(scan(u, op), op['out_norm.weight'], op['out_norm.bias'])
            x = x + linear(u, op['out_proj.weight'])
            hidden = F.gelu(linear(layer_norm(x, *parameters(name + 'norm2')), *parameters(name + 'mlp.fc1')))
            x = x + linear(hidden, *parameters(name + 'mlp.fc2'))
        outputs.append(layer_norm(x, *parameters(f'outnorm{s}')))
        if s < len(depths) - 1:
            down = f'layers.{s}.downsample.'
            x = layer_norm(F.conv2d(x, *parameters(down + '1'), stride=2, padding=1), *parameters(down + '3'))
    return outputs


def test_the_forward_is_the_naive_one():
    model = build()
    x = image(2, 3, 41, 23)
    with torch.no_grad():
        actual, expected = model(x), naive(model, x, SMALL['depths'])
    assert [tuple(y.shape) for y in actual] == [(2, 24, 11, 6), (2, 40, 6, 3)]
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and relative(a, e) < 1e-10


def gradients(model, x):
    torch.manual_seed(3)
    model.zero_grad()
    sum(y.square().sum() for y in model(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_parameter_gets_the_gradient_of_the_naive_forward():
    model = build()
    x = image(1, 3, 20, 12)
    actual = gradients(model, x)
    expected = torch.autograd.grad(sum(y.square().sum() for y in naive(model, x, SMALL['depths'])), model.parameters())
    for (name, a), e in zip(actual.items(), expected, strict=True):
        assert torch.isfinite(a).all() and a.any() and relative(a, e) < 1e-9, name


@pytest.mark.parametrize('stages', [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize(('height', 'width'), [(64, 96), (50, 33), (5, 7), (1, 1)])
def test_every_image_size_works_and_only_the_stages_asked_for_are_returned(height, width, stages):
    model = build(FOUR_STAGES, torch.float32, out_indices=stages, in_channels=1)
    norms = [name for name, _ in model.named_children() if name.startswith('outnorm')]
    assert norms == [f'outnorm{i}' for i in stages]
    for i, y in zip(stages, model(image(1, 1, height, width, dtype=torch.float32)), strict=True):
        stride = 4 * 2**i
        assert y.shape == (1, 16 * 2**i, -(-height // stride), -(-width // stride)) and torch.isfinite(y).all()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(arch='huge'), ('tiny, small, base', 'huge')),
        (dict(arch=dict(dims=(8, 16), depths=(1, 1))), ('ssm_ratio',)),
        (dict(arch=dict(dims=(8, 16), depths=(1,), ssm_ratio=1.0)), ('2 dims', '1 depths')),
        (dict(arch=SMALL, out_indices=(2,)), ('out_indices', '0 to 1', '(2,)')),
        (dict(arch=SMALL, out_indices=()), ('out_indices', '()')),
        (dict(arch=SMALL, out_indices=(1,), frozen_stages=3), ('frozen_stages', '3')),
        (dict(arch=SMALL, out_indices=(1,), drop_path_rate=1.0), ('drop_path_rate', '1.0')),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError) as error:
        VMamba(**options)
    assert all(word in message(error) for word in words)


def test_checkpointing_changes_no_gradient():
    options = dict(arch=FOUR_STAGES, drop_path_rate=0.5)
    x = image(4, 3, 32, 32)
    plain, recomputed = (gradients(build(**options, with_cp=with_cp).train(), x) for with_cp in (False, True))
    whole = gradients(build(**options), x)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


def test_stochastic_depth_drops_whole_images_keeps_the_mean_and_rises_linearly():
    torch.manual_seed(0)
    x = torch.rand(4000, 2, 3) + 1
    drop = DropPath(0.25)
    y = drop(x)
    dropped = (y == 0).flatten(1).all(1)
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.75)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    assert drop.eval()(x) is x
    model = build(FOUR_STAGES, drop_path_rate=0.4)
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_scan_is_computed_in_float32_under_autocast(monkeypatch):
    model = build(FOUR_STAGES, torch.float32)
    x = image(2, 3, 64, 64, dtype=torch.float32)
    expected = model(x)[-1]
    seen = []

    def recurrence(decay, drive, original=selective_scan.linear_recurrence):
        seen.extend([decay.dtype, drive.dtype])
        return original(decay, drive)

    monkeypatch.setattr(selective_scan, 'linear_recurrence', recurrence)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)[-1]
        y.float().square().sum().backward()
    assert seen and set(seen) == {torch.float32}
    assert 1e-5 < relative(y, expected) < 0.1
    assert all(torch.isfinite(p.grad).all() for name, p in model.named_parameters() if re.match('layers', name))


def test_frozen_stages_do_not_train():
    model = build(FOUR_STAGES, frozen_stages=2, drop_path_rate=0.5).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name in model.state_dict() if re.match(r'patch_embed|layers\.[01]\.|outnorm[01]\.', name)
    }
    assert model.training and model.layers[2].training
    assert not any(m.training for m in model.layers[1].modules())
    assert all(p.requires_grad for p in build(FOUR_STAGES).parameters())
    assert not any(p.requires_grad for p in build(FOUR_STAGES, frozen_stages=4).parameters())


def test_the_initial_weights_are_those_of_the_recipe():
    torch.manual_seed(0)
    model = VMamba(dict(dims=(96, 192), depths=(1, 1), ssm_ratio=2.0), out_indices=(1,))
    model.init_weights()
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and layer.weight.abs().max() <= 2
        assert layer.bias is None or not layer.bias.any()
    for stage, rank in zip(model.layers, (6, 12), strict=True):
        op = stage.blocks[0].op
        assert not op.A_logs.any() and (op.Ds == 1).all(), 'A is -1'
        step = F.softplus(op.dt_projs_bias.detach())
        assert step.min() == pytest.approx(1e-3, rel=0.1) and step.max() == pytest.approx(0.1, rel=0.1)
        assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.15), 'uniform in the logarithm'
        assert op.dt_projs_weight.abs().max().item() == pytest.approx(rank**-0.5, rel=0.01)
        assert op.dt_projs_weight.std().item() == pytest.approx((3 * rank) ** -0.5, rel=0.05)


def test_the_config_of_the_docstring_spares_the_scan_from_weight_decay():
    model = build()
    marked = {name for name, p in model.named_parameters() if getattr(p, '_no_weight_decay', False)}
    assert marked == {name for name in model.state_dict() if name.endswith(('.A_logs', '.Ds'))} and len(marked) == 6
    custom_keys = {'A_logs': dict(decay_mult=0.0), '.Ds': dict(decay_mult=0.0)}
    assert all(f"'{key}': dict(decay_mult=0.0)" in VMamba.__doc__ for key in custom_keys)
    config = dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05), paramwise_cfg=dict(custom_keys=custom_keys))
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for group in groups if not group['weight_decay'] for p in group['params']} == marked


def state_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_holds(model, state, **renamed):
    """Asserts that every parameter of the model is that of the state, or the one it is named after."""
    for name, parameter in model.named_parameters():
        source, _, rest = name.partition('.')
        assert torch.equal(parameter, state[f'{renamed.get(source, source)}.{rest}']), name


@pytest.fixture
def classifier_file(tmp_path):
    state = state_of(released(**FOUR_STAGES))
    ema = {name: torch.zeros_like(value) for name, value in state.items()}
    path = tmp_path / 'vssm_ckpt_epoch_1.pth'
    torch.save(dict(model=state, model_ema=ema, epoch=1, max_accuracy=82.6, optimizer=dict(state={})), path)
    return path, state


def test_a_released_classifier_loads_by_itself(classifier_file):
    path, state = classifier_file
    by_config = VMamba(FOUR_STAGES, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    by_config.init_weights()
    by_mmengine, by_torch, bare = VMamba(FOUR_STAGES), VMamba(FOUR_STAGES), VMamba(FOUR_STAGES)
    load_checkpoint(by_mmengine, str(path), strict=True)
    by_torch.load_state_dict(torch.load(path, weights_only=True))
    before = set(state)
    bare.load_state_dict(state)
    assert set(state) == before, 'the own dict of the caller stays as it was'
    for model in (by_config, by_mmengine, by_torch, bare):
        assert_holds(model, state, outnorm3='classifier.norm')


def test_a_released_classifier_loads_for_dense_tasks_but_for_the_norms(classifier_file):
    path, state = classifier_file
    model = VMamba(FOUR_STAGES, out_indices=(0, 1, 2, 3))
    report = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == {f'outnorm{i}.{key}' for i in range(4) for key in ('weight', 'bias')}
    assert_holds(model, state | {key: p for key, p in model.named_parameters() if key.startswith('outnorm')})


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_a_dense_file_loads_with_its_norms(prefix, tmp_path):
    state = state_of({k: v for k, v in released(**FOUR_STAGES).items() if not k.startswith('classifier.')})
    state |= state_of({f'outnorm{i}.{k}': (16 * 2**i,) for i in range(4) for k in ('weight', 'bias')}, seed=1)
    content = {prefix + name: value for name, value in state.items()}
    if prefix:
        content['neck.conv.weight'] = torch.ones(1)
    torch.save(dict(meta=dict(epoch=12), state_dict=content), tmp_path / 'dense.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'))
    init_cfg |= dict(prefix=prefix) if prefix else {}
    model = VMamba(FOUR_STAGES, out_indices=(0, 1, 2, 3), init_cfg=init_cfg)
    model.init_weights()
    assert_holds(model, state)
    single = VMamba(FOUR_STAGES)
    single.load_state_dict(state | state_of({'classifier.norm.weight': (128,)}, seed=2), strict=False)
    assert torch.equal(single.outnorm3.weight, state['outnorm3.weight']), 'a norm of its own comes first'


def test_early_names_and_1x1_convolutions_are_translated():
    state = state_of(released(**FOUR_STAGES))
    early = {}
    for name, value in state.items():
        name = re.sub(r'^classifier\.', '', name)
        name = re.sub(r'(blocks\.\d+)\.norm\.', r'\1.ln_1.', name)
        name = name.replace('.op.', '.self_attention.')
        name = name.replace('patch_embed.0.', 'patch_embed.proj.').replace('patch_embed.2.', 'patch_embed.norm.')
        convolution = re.search(r'(in_proj|out_proj|fc1|fc2)\.weight', name)
        early[name] = value[..., None, None] if convolution else value
    assert len(early) == len(state) and 'head.weight' in early and 'norm.bias' in early
    model = VMamba(FOUR_STAGES)
    model.load_state_dict(early)
    assert_holds(model, state, outnorm3='classifier.norm')


def test_what_does_not_fit_is_an_error():
    state = state_of(released(**FOUR_STAGES))
    state['layers.0.blocks.0.mlp.fc1.weight'] = torch.ones(64, 16, 3, 3)
    state['layers.0.blocks.0.op.gate'] = torch.ones(1)
    with pytest.raises(RuntimeError) as error:
        VMamba(FOUR_STAGES).load_state_dict(state)
    assert 'mlp.fc1.weight' in str(error.value) and 'op.gate' in str(error.value)


@pytest.mark.parametrize('scope', [None, 'mmdet', 'mmseg', 'mmpretrain'])
def test_every_library_finds_it(scope):
    assert type(MODELS.build(dict(type='VMamba', arch=SMALL, out_indices=(1,), _scope_=scope))) is VMamba


def classifier(num_classes, **options):
    init_default_scope('mmpretrain')
    backbone = dict(type='VMamba', arch=FOUR_STAGES, **options)
    head = dict(type='LinearClsHead', num_classes=num_classes, in_channels=128)
    neck = dict(type='GlobalAveragePooling')
    return MODELS.build(dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head))


def test_a_classifier_of_mmpretrain_trains_and_keeps_its_names(classifier_file):
    path, state = classifier_file
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model, second = (classifier(3, init_cfg=init_cfg) for _ in range(2))
    model.init_weights()
    assert_holds(model.backbone, state, outnorm3='classifier.norm')
    second.load_state_dict(model.state_dict())
    x = image(2, 3, 32, 32, dtype=torch.float32)
    assert torch.equal(model.eval()(x), second.eval()(x))
    features = model.extract_feat(x)
    model.head(features).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_released_classifier_is_converted_with_its_head(classifier_file, tmp_path, monkeypatch):
    """Pickled settings of the run do no harm."""
    path, state = classifier_file
    yacs = types.ModuleType('yacs.config')
    yacs.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', yacs)
    settings = yacs.CfgNode(MODEL=yacs.CfgNode(TYPE='vssm'))
    torch.save(dict(torch.load(path, weights_only=True), config=settings), path)
    allow_training_checkpoints()
    direct = VMamba(FOUR_STAGES, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    direct.init_weights()
    assert_holds(direct, state, outnorm3='classifier.norm')
    run_tool('convert_checkpoint', 'vmamba', path, tmp_path / 'converted.pth')
    model = classifier(1000)
    load_checkpoint(model, str(tmp_path / 'converted.pth'), strict=True)
    assert_holds(model.backbone, state, outnorm3='classifier.norm')
    assert torch.equal(model.head.fc.weight, state['classifier.head.weight'])
    assert torch.equal(model.head.fc.bias, state['classifier.head.bias'])


def test_what_is_no_classifier_is_not_converted(tmp_path):
    source, target = tmp_path / 'other.pth', tmp_path / 'converted.pth'
    torch.save(dict(model={'conv1.weight': torch.ones(1)}), source)
    assert 'other.pth' in sentence('convert_checkpoint', 'vmamba', source, target) and not target.exists()


def test_every_linear_layer_of_the_blocks_gets_a_denoiser_and_fuses_exactly():
    model = build()
    x = image(1, 3, 40, 28)
    report = apply_denoiserep(model, LINEAR, example_input=x)
    assert len(report.layers) == 4 * 3 and not report.skipped and report.order == 'execution'
    first = [row.name.split('.', 4)[-1] for row in report.layers[:4]]
    assert first == ['op.in_proj', 'op.out_proj', 'mlp.fc1', 'mlp.fc2']
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            assert isinstance(layer, DenoiseLinear)
            assert (layer.denoiser.bias is None) == name.endswith('proj'), 'no bias to fold it into'
    vanilla = build()(x)
    randomise(model)
    assert all(relative(a, e) > 1e-3 for a, e in zip(model(x), vanilla, strict=True)), 'the denoisers matter'
    verification = verify_fusion(model, example_input=x)
    assert len(verification.differences) == 2 and verification.ok
    assert max(d.max_rel for d in verification.differences) < 1e-9
    fused = fuse_model(model)
    assert fused.state_dict().keys() == build().state_dict().keys()


def test_the_factory_builds_it_and_vanilla_weights_load(classifier_file):
    path, state = classifier_file
    config = dict(type='VMamba', arch=FOUR_STAGES, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model = MODELS.build(dict(type='DenoiseRepBackbone', backbone=config, targets='mlp', rank=None, image_size=32))
    names = [name for name, m in model.named_modules() if isinstance(m, DenoiseLinear)]
    assert names == [n for n, m in VMamba(FOUR_STAGES).named_modules() if n.endswith(('mlp.fc1', 'mlp.fc2'))]
    assert 'layers.0.blocks.0.mlp.fc1' in names
    report = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == {f'{n}.denoiser.{key}' for n in names for key in ('weight', 'bias')}
    model.init_weights()
    randomise(model)
    fused = fuse_model(model)
    assert torch.equal(fused.layers[0].downsample[1].weight, state['layers.0.downsample.1.weight'])
    assert verify_fusion(model.double(), example_input=image(2, 3, 32, 48)).differences[0].max_rel < 1e-9


def test_the_fused_backbone_runs_in_onnxruntime(tmp_path):
    model = build(dtype=torch.float32)
    x = image(2, 3, 64, 64, dtype=torch.float32)
    apply_denoiserep(model, LINEAR, example_input=x)
    fused = fuse_model(randomise(model))
    with torch.no_grad():
        expected = fused(x)
        torch.onnx.export(fused, (x,), tmp_path / 'vmamba.onnx', input_names=['image'], dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / 'vmamba.onnx', providers=['CPUExecutionProvider'])
    for actual, e in zip(session.run(None, dict(image=x.numpy())), expected, strict=True):
        assert actual.dtype == np.float32 and relative(torch.from_numpy(actual), e) < 1e-4


@pytest.mark.parametrize('kernel', [None, print])
def test_what_scans_on_a_gpu_is_logged_once(kernel, monkeypatch):
    lines = []
    monkeypatch.setattr(vmamba, 'cuda_kernel', lambda device: kernel)
    monkeypatch.setattr(vmamba, 'print_log', lambda text, logger: lines.append(text))
    vmamba._log_scan.cache_clear()
    for _ in range(2):
        vmamba._log_scan(torch.device('cuda'))
    vmamba._log_scan.cache_clear()
    assert len(lines) == 1 and ('kernel of mamba-ssm' in lines[0]) == (kernel is print)

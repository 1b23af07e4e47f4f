"""The fusion: exact per layer and for whole backbones, and never touching the live model."""

import copy
import functools
import types
from collections import OrderedDict

import pytest
import torch
from mmpretrain.models import LoRAModel, MobileNetV2, ResNet, SwinTransformer, SwinTransformerV2, VisionTransformer
from mmseg.models import MixVisionTransformer
from mmseg.models import VisionTransformer as SegVisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, prune

from helpers import copied, denoised, equal, randomise, relative, signature
from mmdenoiserep import apply_denoiserep, fuse_model, fuse_state_dict, verify_fusion
from mmdenoiserep.core import DenoiseLayer, Denoiser, FusionError
from mmdenoiserep.core.fusing.fuse import find_denoisers
from mmdenoiserep.core.method.layers import convert_layer


def linear(**kw):
    return lambda: nn.Linear(12, 10, **kw)


def conv(*args, out=12, **kw):
    return lambda: nn.Conv2d(12, out, *args, **kw)


# name: (how to build it, whether the denoiser gets a bias)
LAYERS = {
    'linear': (linear(), True),
    'linear-no-bias': (linear(bias=False), False),
    'conv1x1': (conv(1), True),
    'conv3x3': (conv(3), True),
    'conv3x5-no-bias': (conv((3, 5), bias=False), False),
    'zeros': (conv(3, padding=1), False),
    'zeros-one-axis': (conv(3, padding=(0, 1)), False),
    'zeros-no-bias': (conv(3, padding=1, bias=False), False),
    'same': (conv(3, padding='same'), False),
    'same-1x1': (conv(1, padding='same'), True),
    'valid': (conv(3, padding='valid'), True),
    'stride': (conv(3, stride=2, padding=1), False),
    'patch-embedding': (conv(4, stride=4), True),
    'dilation': (conv(3, dilation=2), True),
    'reflect': (conv(3, padding=1, padding_mode='reflect'), True),
    'circular': (conv(3, padding=2, padding_mode='circular'), True),
    'replicate': (conv(3, padding=1, padding_mode='replicate'), True),
    'reflect-same': (conv(3, padding='same', padding_mode='reflect'), True),
    'reflect-no-bias': (conv(3, padding=1, padding_mode='reflect', bias=False), False),
    'groups': (conv(3, groups=3), True),
    'groups-wider': (conv(3, out=24, groups=2, stride=2, dilation=2, padding=2), False),
    'groups-circular': (conv(3, groups=4, padding=1, padding_mode='circular'), True),
    'depthwise': (conv(3, groups=12), True),
    'depthwise-zeros': (conv(3, groups=12, padding=1, bias=False), False),
    'depthwise-multiplied': (conv(3, out=24, groups=12, padding=1, padding_mode='replicate'), True),
}


def example(layer, dtype=torch.float64):
    shape = (2, 7, 12) if isinstance(layer, nn.Linear) else (2, 12, 9, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=['double', 'float'])
@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_layers_fuse_exactly(kind, rank, dtype, tolerance):
    """A plain layer of the same shape gives the same output."""
    build, with_bias = LAYERS[kind]
    torch.manual_seed(0)
    vanilla = build().to(dtype)
    layer = denoised(copy.deepcopy(vanilla), rank)
    assert (layer.denoiser.bias is not None) == with_bias
    fused = fuse_model(layer)
    assert type(fused) is type(vanilla)
    assert signature(fused.state_dict()) == signature(vanilla.state_dict())
    x = example(vanilla, dtype)
    with torch.no_grad():
        defined = layer.forward_by_definition(x)
        assert relative(fused(x), defined) < tolerance
        assert relative(layer(x), defined) < tolerance
        assert relative(vanilla(x), defined) > 0.05


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('rank', [None, 4])
@pytest.mark.parametrize(
    'build, shape',
    [
        (lambda: nn.Linear(256, 192), (64, 256)),
        (lambda: nn.Linear(256, 192, bias=False), (64, 256)),
        (lambda: nn.Conv2d(64, 32, 3), (1, 64, 12, 12)),
        (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=4), (1, 64, 12, 12)),
    ],
    ids=['linear', 'linear-no-bias', 'conv', 'grouped'],
)
def test_half_precision(build, shape, rank, dtype):
    """Against float64, the fused half-precision layer errs at most twice as much as the vanilla one."""
    torch.manual_seed(0)
    vanilla = build().to(dtype)
    layer = denoised(copy.deepcopy(vanilla), rank)
    fused = fuse_model(layer)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        reference = copy.deepcopy(layer).double().forward_by_definition(x.double())
        own = relative(vanilla(x), copy.deepcopy(vanilla).double()(x.double()))
        assert fused.weight.dtype == dtype
        assert relative(fused(x), reference) < 2 * own
        assert relative(vanilla(x), reference) > 10 * own


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_a_layer_fuses_itself(kind, rank):
    """``fuse()`` and the fusion of the state dict do bitwise what :func:`fuse_model` does; the layer stays."""
    layer = denoised(LAYERS[kind][0](), rank)
    layer.weight.requires_grad_(False)
    before, expected = copy.deepcopy(layer), fuse_model(layer)
    plain = layer.fuse()
    assert type(plain) is type(expected) and repr(plain) == repr(expected)
    assert not plain.weight.requires_grad
    for state in (plain.state_dict(), fuse_state_dict(layer.state_dict())):
        assert signature(state) == signature(expected.state_dict()) and equal(state, expected.state_dict())
    assert equal(layer.state_dict(), before.state_dict())
    assert type(layer) is type(before) and layer.timestep == before.timestep
    assert not torch.equal(plain.weight, layer.weight)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda layer: layer.denoiser.weight.data.fill_(torch.nan), r'the layer\.denoiser\.weight holds NaN or Inf'),
        (lambda layer: prune.l1_unstructured(layer, 'weight', 0.5), 'the weight of the layer was pruned'),
        (parametrizations.orthogonal, 'the weight of the layer was pruned or parametrised'),
    ],
    ids=['NaN', 'pruned', 'parametrised'],
)
def test_a_layer_that_cannot_be_fused_says_so(damage, message):
    layer = denoised(nn.Linear(12, 4))
    damage(layer)
    with pytest.raises(FusionError, match=message):
        layer.fuse()


def put_fused_layers(module):
    """Does what timm's ``reparameterize_model`` does: what ``fuse()`` returns takes the place of the layer."""
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if hasattr(child, 'fuse') else put_fused_layers(child))
    return module


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('library', ['timm', 'none'])
def test_timm_fuses_the_layers_of_a_model(rank, library):
    """``timm.utils.reparameterize_model`` works, and where timm is not installed, what it does."""
    reparameterize_model = put_fused_layers
    if library == 'timm':
        reparameterize_model = pytest.importorskip('timm.utils').reparameterize_model
    model = nn.Sequential(nn.Conv2d(12, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(42, 5)).eval()
    x = torch.randn(2, 12, 9, 8)
    apply_denoiserep(model, 'all', rank=rank, example_input=x)
    expected, actual = fuse_model(randomise(model)).state_dict(), reparameterize_model(model)
    assert signature(actual.state_dict()) == signature(expected) and equal(actual.state_dict(), expected)


def test_zero_padding_needs_the_care():
    """A denoiser bias forced into a zero-padded conv is wrong at the borders, and there only."""
    torch.manual_seed(0)
    layer = denoised(nn.Conv2d(12, 8, 3, padding=1, dtype=torch.float64))
    weight = layer.denoiser.weight.detach()
    layer.denoiser = Denoiser(12, bias=True, dtype=torch.float64)
    layer.denoiser.load_state_dict({'weight': weight, 'bias': torch.ones(12)})
    x = example(layer)
    wrong = (fuse_model(layer)(x) - layer.forward_by_definition(x)).abs()
    assert wrong[..., 1:-1, 1:-1].max() < 1e-12
    assert wrong.max() > 0.1


VIT = {'embed_dims': 32, 'num_layers': 2, 'num_heads': 2, 'feedforward_channels': 64}
SWIN = {'embed_dims': 32, 'depths': [2, 2], 'num_heads': [2, 4]}
BACKBONES = {
    'resnet': (lambda: ResNet(18, stem_channels=16, base_channels=16, out_indices=(0, 1, 2, 3)), 32),
    'mobilenet': (lambda: MobileNetV2(widen_factor=0.25, out_indices=(2, 7)), 64),
    'swin': (lambda: SwinTransformer(SWIN, img_size=56, out_indices=(0, 1)), 56),
    'swin-v2': (
        lambda: SwinTransformerV2(
            {**SWIN, 'extra_norm_every_n_blocks': 0}, img_size=64, window_size=8, out_indices=(0, 1)
        ),
        64,
    ),
    'vit': (lambda: VisionTransformer(VIT, img_size=32, patch_size=8, out_type='featmap'), 32),
    'vit-without-qkv-bias': (lambda: VisionTransformer(VIT, img_size=32, patch_size=8, qkv_bias=False), 32),
    'segformer': (lambda: MixVisionTransformer(embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 2, 4]), 64),
    'mmseg-vit': (
        lambda: SegVisionTransformer(img_size=32, patch_size=8, embed_dims=32, num_layers=2, num_heads=2),
        32,
    ),
}


def build_backbone(kind, rank=None, targets='all', dtype=torch.float64):
    build, size = BACKBONES[kind]
    torch.manual_seed(0)
    vanilla = build()
    vanilla.init_weights()
    vanilla = randomise(vanilla.to(dtype))
    images = torch.randn(2, 3, size, size, dtype=dtype)
    model = copy.deepcopy(vanilla)
    report = apply_denoiserep(model, targets, rank=rank, example_input=images[:1])
    return vanilla, randomise(model), images, report


@pytest.mark.parametrize('rank', [None, 3])
@pytest.mark.parametrize('kind', BACKBONES)
def test_backbones_fuse_exactly(kind, rank):
    """Relative 1e-9 in float64 with random denoisers and BatchNorm; the vanilla model would not pass."""
    vanilla, model, images, report = build_backbone(kind, rank)
    assert report.order == 'execution'
    assert len(report.layers) >= 5
    fused = fuse_model(model)
    verification = verify_fusion(model, fused, images)
    assert verification.ok, str(verification)
    assert all(difference.tolerance == 1e-9 for difference in verification.differences)
    assert max(difference.max_abs for difference in verification.differences) > 0
    noop = verify_fusion(model, vanilla, images)
    assert not noop.ok
    assert min(difference.max_rel for difference in noop.differences) > 1e-2

    assert [type(module) for module in fused.modules()] == [type(module) for module in vanilla.modules()]
    assert signature(fused.state_dict()) == signature(vanilla.state_dict())
    assert repr(fused) == repr(vanilla)
    expected = copy.deepcopy(vanilla).load_state_dict(vanilla.state_dict(), strict=False)  # SwinV2 drops tables
    assert copy.deepcopy(vanilla).load_state_dict(fused.state_dict(), strict=False) == expected


def test_bypassed_layers_would_be_wrong():
    _, model, images, report = build_backbone('swin-v2')
    name = next(name for name, reason in report.skipped.items() if name.endswith('.qkv') and 'bypassed' in reason)
    convert_layer(model.get_submodule(name), 1, None, None, None)
    assert not verify_fusion(randomise(model), example_input=images).ok


@pytest.mark.parametrize('train', [True, False])
def test_fusing_leaves_the_model_and_repeats(train):
    """Two fusions are bitwise equal, in train and eval mode; the live model, its buffers and modes stay."""
    _, model, images, _ = build_backbone('resnet', 3, dtype=torch.float32)
    for module in model.modules():
        module.training = train
    before, random_state = copied(model.state_dict()), torch.get_rng_state()
    first, second = fuse_model(model), fuse_model(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training == train for module in (*model.modules(), *first.modules()))
    assert any(isinstance(module, DenoiseLayer) for module in model.modules())
    assert equal(model.state_dict(), before)
    assert equal(first.state_dict(), second.state_dict())
    live, fused = ({value.data_ptr() for value in each.state_dict().values()} for each in (model, first))
    assert not live & fused


def test_fused_model_keeps_requires_grad():
    """Frozen layers come back frozen, others trainable, and the fused model can be trained."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    model[0].requires_grad_(False)
    apply_denoiserep(model, 'all', example_input=torch.zeros(1, 12))
    fused = fuse_model(randomise(model))
    assert [parameter.requires_grad for parameter in fused.parameters()] == [False, False, True, True]
    fused(torch.ones(1, 12)).sum().backward()
    assert fused[1].weight.grad is not None


@pytest.mark.parametrize('fuse', [fuse_model, DenoiseLayer.fuse])
def test_what_is_fused_has_no_hooks_of_this_package(fuse):
    """Hooks of this package stay with the live layer; those of others are kept in the copy too."""
    layer, calls = denoised(nn.Linear(12, 4)), []

    def own(*args):
        calls.append('own')

    own.__module__ = 'mmdenoiserep.engine.loss_hook'
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        register(own)
        register(lambda *args: calls.append('other'))
    x = example(layer, torch.float32)
    fuse(layer)(x)
    assert calls == ['other'] * 2
    layer(x)
    assert sorted(calls) == ['other'] * 4 + ['own'] * 2


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(12, 12, dtype=torch.float64)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize('rank', [None, 2])
def test_shared_layer(rank):
    vanilla = Shared()
    model, x = copy.deepcopy(vanilla), torch.randn(3, 12, dtype=torch.float64)
    apply_denoiserep(model, 'all', rank=rank, example_input=x)
    fused = fuse_model(randomise(model))
    assert fused.first is fused.second
    assert verify_fusion(model, fused, x).ok
    state = fuse_state_dict(model.state_dict())
    assert torch.equal(state['first.weight'], state['second.weight'])
    vanilla.load_state_dict(state, strict=True)
    assert relative(vanilla(x), model(x)) < 1e-12


def test_state_dict_fusion_keeps_the_rest():
    """Other entries stay the same objects in the same order; `_metadata` stays without the denoisers."""
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))
    metadata = copy.deepcopy(model.state_dict()._metadata)
    keys = list(model.state_dict())
    apply_denoiserep(model, '0', example_input=torch.zeros(1, 12))
    state = randomise(model).state_dict()
    before, fused = copied(state), fuse_state_dict(state)
    assert list(fused) == keys
    assert fused._metadata == metadata
    assert all(fused[key] is state[key] for key in keys if not key.startswith('0.'))
    assert not torch.equal(fused['0.weight'], state['0.weight'])
    assert equal(state, before)


def broken(rank=None, **changes):
    """A fusable state dict of one Linear(12, 4) named fc with some entries changed; None removes."""
    state = OrderedDict((f'fc.{key}', value) for key, value in denoised(nn.Linear(12, 4), rank).state_dict().items())
    for key, value in changes.items():
        key = f'fc.{key}'.replace('__', '.')
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


@pytest.mark.parametrize('beside', [False, True], ids=['alone', 'beside a users own'])
@pytest.mark.parametrize(
    'state, message',
    [
        (broken(denoiser__weight=None, denoiser__bias=None), 'no denoiser'),
        (broken(weight=None), 'fc has a denoiser but no weight'),
        (broken(weight=None, bias=None), 'no weight'),
        (broken(rank=2, weight=None), 'no weight'),
        (broken(bias=None), 'has a bias, but the layer has none'),
        (broken(denoiser__weight=None), 'incomplete'),
        (broken(rank=2, denoiser__up=None), 'incomplete'),
        (broken(rank=2, denoiser__down=None), 'incomplete'),
        (broken(denoiser__gain=torch.ones(1)), r'denoiser\.gain.* no parameter of a denoiser'),
        (broken(rank=2, denoiser__weight=torch.zeros(1, 12, 12)), 'denoiser of fc'),
        (broken(denoiser__weight=torch.full((1, 12, 12), torch.nan)), r'fc\.denoiser\.weight holds NaN or Inf'),
        (broken(denoiser__bias=torch.full((12,), torch.inf)), r'fc\.denoiser\.bias holds NaN or Inf'),
        (broken(weight=torch.full((4, 12), -torch.inf)), r'fc\.weight holds NaN or Inf'),
        (broken(bias=torch.full((4,), torch.nan)), r'fc\.bias holds NaN or Inf'),
        (broken(denoiser__weight=torch.zeros(1, 11, 11)), r'\(1, 11, 11\).* does not fit its weight \(4, 12\)'),
        (broken(denoiser__weight=torch.zeros(2, 12, 12), denoiser__bias=None), 'does not fit'),
        (broken(denoiser__weight=torch.zeros(5, 12, 12)), 'does not fit'),
        (broken(denoiser__weight=torch.zeros(12, 12)), r'no denoiser in it .(fc|head)\.denoiser'),
        (broken(denoiser__weight=torch.zeros(())), 'does not fit'),
        (broken(denoiser__bias=torch.zeros(1)), 'does not fit'),
        (broken(bias=torch.zeros(1)), 'does not fit'),
        (broken(weight=torch.zeros(12)), 'does not fit'),
        (broken(rank=2, denoiser__scale=torch.zeros(2), denoiser__bias=None), 'does not fit'),
        (broken(rank=2, denoiser__up=torch.zeros(2, 12, 2), denoiser__bias=None), 'does not fit'),
        (broken(rank=2, denoiser__scale=torch.zeros(())), 'does not fit'),
        (broken(rank=2, denoiser__up=torch.zeros(1, 12, 3)), 'does not fit'),
        (broken(rank=2, denoiser__down=torch.zeros(4, 2, 12)), 'does not fit'),
    ],
)
def test_what_can_not_be_fused(state, message, beside):
    """One sentence names the layer, also where the model has a denoiser of its own."""
    own = Own(nn.Linear(12, 12)).state_dict() if beside else {}
    with pytest.raises(FusionError, match=message) as caught:
        fuse_state_dict({f'head.{key}': value for key, value in own.items()} | state)
    assert '\n' not in str(caught.value)


class Own(nn.Module):
    def __init__(self, denoiser, weight=None):
        super().__init__()
        self.enc = nn.Linear(12, 12)
        self.denoiser = denoiser
        if weight is not None:
            self.weight = nn.Parameter(weight)

    def forward(self, x):
        return self.enc(x)


OWN = {
    'linear': lambda: Own(nn.Linear(12, 12)),
    'norm': lambda: Own(nn.LayerNorm(12)),
    'batch norm': lambda: Own(nn.BatchNorm2d(12)),
    'conv': lambda: Own(nn.Conv2d(12, 12, 3)),
    'conv1d': lambda: Own(nn.Conv1d(12, 12, 3)),
    'conv1d with a square kernel': lambda: Own(nn.Conv1d(3, 8, 3)),
    'conv3d': lambda: Own(nn.Conv3d(2, 2, 3)),
    'sequence': lambda: Own(nn.Sequential(nn.Linear(12, 12), nn.ReLU())),
    'scale': lambda: Own(nn.ParameterDict({'scale': torch.ones(1), 'bias': torch.ones(3)})),
    'child of a linear layer': lambda: Own(nn.Linear(12, 12), weight=torch.ones(12, 12)),
    'conv1d beside a weight': lambda: Own(nn.Conv1d(12, 12, 3), weight=torch.ones(12, 12)),
    'norm beside a weight': lambda: Own(nn.GroupNorm(3, 12), weight=torch.ones(12, 12)),
    'nested': lambda: Own(Own(nn.Linear(12, 12))),
}


@pytest.mark.parametrize('kind', OWN)
def test_modules_of_the_users_own_called_denoiser(kind):
    """They are no denoisers: fusing leaves them as they are, as a state dict and as a model."""
    torch.manual_seed(0)
    own = OWN[kind]()
    assert find_denoisers(own.state_dict()) == {}
    with pytest.raises(FusionError, match='no denoiser'):
        fuse_state_dict(own.state_dict())
    for model, prefix in ((copy.deepcopy(own), ''), (nn.ModuleDict({'head': own}), 'head.')):
        vanilla, layer = copy.deepcopy(model), f'{prefix}enc'
        apply_denoiserep(model.get_submodule(prefix.rstrip('.')), 'enc', example_input=torch.randn(2, 12))
        state = randomise(model).state_dict()
        assert list(find_denoisers(state)) == [f'{layer}.']
        fused = fuse_state_dict(state)
        assert list(fused) == list(vanilla.state_dict())
        assert all(fused[key] is state[key] for key in fused if not key.startswith(f'{layer}.'))
        vanilla.load_state_dict(fused, strict=True)
        twin = fuse_model(model)
        assert all(torch.equal(value, fused[key]) for key, value in twin.state_dict().items())
        assert not torch.equal(fused[f'{layer}.weight'], state[f'{layer}.weight'])


def test_a_layer_called_denoiser_gets_one():
    model, x = Own(nn.Linear(12, 12)).double(), torch.randn(2, 12, dtype=torch.float64)
    model.forward = lambda x: model.denoiser(model.enc(x).relu())
    expected = copy.deepcopy(list(model.state_dict()))
    assert len(apply_denoiserep(model, 'all', rank=3, example_input=x).layers) == 2
    state = randomise(model).state_dict()
    assert sorted(find_denoisers(state)) == ['denoiser.', 'enc.']
    fused = fuse_state_dict(state)
    assert list(fused) == expected
    plain = Own(nn.Linear(12, 12)).double()
    plain.load_state_dict(fused, strict=True)
    assert relative(plain.denoiser(plain.enc(x).relu()), model(x)) < 1e-9


def test_entries_that_are_no_tensors():
    """``_extra_state`` of any kind stays as it is, also where it is called denoiser."""
    extra = {'head._extra_state': {'a': 1}, 'head.denoiser.weight': 'none', 'head.denoiser.scale': None}
    state = broken()
    fused = fuse_state_dict(state | extra)
    assert {key: fused[key] for key in extra} == extra
    assert torch.equal(fused['fc.weight'], fuse_state_dict(state)['fc.weight'])


class Odd(nn.Module):
    """Two layers; what its state dict holds is up to a hook."""

    def __init__(self, hook=None):
        super().__init__()
        self.f, self.g = nn.Linear(12, 12), nn.Linear(12, 4)
        if hook:
            self._register_state_dict_hook(lambda module, state, prefix, local: hook(state))

    def forward(self, x):
        return self.g(self.f(x).relu())


class Extra(Odd):
    def get_extra_state(self):
        return {'version': object()}

    def set_extra_state(self, state):
        pass


class Overriding(Odd):
    def state_dict(self, *args, **kwargs):
        return {}


@pytest.mark.parametrize(
    'make',
    [
        lambda: Odd(lambda state: OrderedDict((f'net.{key}', value) for key, value in state.items())),
        lambda: Odd(lambda state: [state.pop(key) for key in list(state) if 'f.' in key] and None),
        lambda: Odd(lambda state: state.update(note='text')),
        Overriding,
        Extra,
    ],
    ids=['renames', 'leaves out', 'adds text', 'overridden', 'extra state'],
)
def test_models_fuse_by_their_modules(make):
    """What a state dict renames, leaves out or adds plays no part."""
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, 12, dtype=torch.float64)
    vanilla = copy.deepcopy(model)
    apply_denoiserep(model, 'all', rank=3, example_input=x)
    fused = fuse_model(randomise(model))
    assert type(fused.f) is nn.Linear
    assert relative(fused(x), model(x)) < 1e-9
    assert relative(vanilla(x), model(x)) > 1e-2
    assert verify_fusion(model, fused, x).ok


def test_lora_model():
    """mmpretrain's LoRAModel, whose state dict holds the LoRA weights alone: as a model, and as a file."""
    torch.manual_seed(0)
    config = {'type': 'VisionTransformer', 'arch': VIT, 'img_size': 32, 'patch_size': 8}
    model = LoRAModel(config, alpha=1, rank=2, targets=[{'type': 'qkv'}, {'type': '.*ffn.*0'}]).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    vanilla = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    apply_denoiserep(model, 'all', rank=2, example_input=x)
    fused = fuse_model(randomise(model))
    assert relative(fused(x)[0], model(x)[0]) < 1e-9
    assert relative(vanilla(x)[0], model(x)[0]) > 1e-2
    assert [key for key, _ in fused.named_parameters()] == [key for key, _ in vanilla.named_parameters()]

    for name, parameter in model.named_parameters():
        if '.denoiser.' in name and '.lora_' not in name:  # the layers of the base model are frozen, so these stay zero
            parameter.data.zero_()
    state = fuse_state_dict(model.state_dict())
    assert list(state) == list(vanilla.state_dict())
    vanilla.load_state_dict({key: value for key, value in model.named_parameters() if '.denoiser.' not in key}, False)
    vanilla.load_state_dict(state, strict=False)
    assert relative(vanilla(x)[0], model(x)[0]) < 1e-9


@pytest.mark.parametrize(
    'tie',
    [
        lambda head, layer: setattr(head, 'weight', layer.weight),
        lambda head, layer: setattr(head, 'weight', nn.Parameter(layer.weight.data.t())),
        lambda head, layer: setattr(head, 'bias', nn.Parameter(layer.bias.data[:3])),
        lambda head, layer: head.register_buffer('kept', layer.weight.data[2:4]),
    ],
    ids=['one parameter', 'transposed', 'part of a bias', 'buffer'],
)
@pytest.mark.parametrize('denoised_head', [False, True])
def test_weights_that_are_tied_after_the_conversion(tie, denoised_head, tmp_path):
    """A head that is built later may share a weight of the backbone: fusing it would change the head."""
    model = nn.ModuleDict({'backbone': Odd(), 'head': nn.Linear(12, 12)})
    apply_denoiserep(model['backbone'], 'all', example_input=torch.randn(3, 12))
    if denoised_head:
        convert_layer(model['head'], 1, None, None, None)
    assert fuse_model(randomise(model))
    assert fuse_state_dict(model.state_dict())
    tie(model['head'], model['backbone'].f)
    with pytest.raises(FusionError, match=r'of backbone\.f is shared'):
        fuse_model(model)
    torch.save(model.state_dict(), tmp_path / 'state.pth')
    for state in (
        model.state_dict(),
        torch.load(tmp_path / 'state.pth'),
        torch.load(tmp_path / 'state.pth', mmap=True),
    ):
        with pytest.raises(FusionError, match=r'(backbone\.f|head)\.\w+ is shared with (head|backbone\.f)\.'):
            fuse_state_dict(state)


def test_a_forward_that_holds_the_model():
    """A copy would go on to call the denoised layers: refused; a bound method goes with the copy."""
    x = torch.randn(3, 12, dtype=torch.float64)
    for replace in (
        lambda model: lambda x: model.g(model.f(x)),
        lambda model: functools.partial(type(model).forward, model),
    ):
        model = Odd().double()
        model.forward = replace(model)
        apply_denoiserep(model, 'all', example_input=x)
        if isinstance(model.forward, types.FunctionType):
            with pytest.raises(FusionError, match='forward of the model'):
                fuse_model(randomise(model))
        else:
            assert relative(fuse_model(randomise(model))(x), model(x)) < 1e-9
            assert not any(isinstance(part, DenoiseLayer) for part in fuse_model(model).forward.args[0].modules())


def test_pruned_after_the_conversion():
    """A layer that was pruned or parametrised since is refused by name, and fuses once that is permanent."""
    model, x = Odd().double(), torch.randn(3, 12, dtype=torch.float64)
    apply_denoiserep(model, 'all', rank=None, example_input=x)
    prune.l1_unstructured(randomise(model).f, 'weight', 0.5)
    with pytest.raises(FusionError, match=r'weight of f was pruned'):
        fuse_model(model)
    prune.remove(model.f, 'weight')
    assert relative(fuse_model(model)(x), model(x)) < 1e-9
    parametrizations.orthogonal(model.f)
    with pytest.raises(FusionError, match=r'weight of f was'):
        fuse_model(model)


def test_overflow_is_refused():
    layer = denoised(nn.Linear(12, 4)).half()
    layer.denoiser.weight.data.fill_(6e4)
    layer.weight.data.fill_(100)
    with pytest.raises(FusionError, match=r'overflows torch\.float16'):
        fuse_model(layer)


def test_fusing_a_vanilla_model_is_refused():
    """So is fusing twice."""
    layer = denoised(nn.Linear(12, 4))
    with pytest.raises(FusionError, match='no denoiser'):
        fuse_model(fuse_model(layer))

"""The conversion: which layers, in which order, with which options, and what is skipped and why."""

import random
import re
import types

import mmcv.cnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvWS2d
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from mmpretrain.models import RepVGG
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from helpers import copied, denoised, equal, random_states, randomise, relative
from mmdenoiserep import DenoiseConv2d, DenoiseLinear, NoiseSchedule, apply_denoiserep, fuse_model, verify_fusion
from mmdenoiserep.core import DenoiseLayer, InputError, collect_moments
from mmdenoiserep.core.method.probe import image_channels

X = torch.randn(2, 8)


class Chain(nn.Module):
    """Calls its children in the order of their names, whatever the order of registration."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for name in sorted(self._modules):
            x = self._modules[name](x)
        return x


def linears(*names):
    return {name: nn.Linear(8, 8) for name in names}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(
            Chain(attn=nn.Linear(8, 8), mlp=Chain(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8))) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(self.norm(x)))


NET = ['stem', *(f'blocks.{i}.{n}' for i in '01' for n in ('attn', 'mlp.fc1', 'mlp.fc2')), 'head']


def convert(model, targets='all', x=X, **options):
    """Converts a model; returns the names in the order of the report, and the report."""
    report = apply_denoiserep(model, targets, example_input=x, **options)
    names = [row.name for row in report.layers]
    assert {n for n, m in model.named_modules() if isinstance(m, DenoiseLayer)} == set(names)
    return names, report


def check_converted(model, names, reason='', x=X):
    """Converts a model; these layers take part, all others are skipped for the reason, and the fusion is exact."""
    found, report = convert(model, x=x)
    assert found == names
    layers = {name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    assert set(report.skipped) == layers - set(names)
    assert all(reason in why for why in report.skipped.values())
    assert verify_fusion(randomise(model), example_input=x).ok
    return report


@pytest.mark.parametrize(
    'targets, exclude, expected',
    [
        ('all', (), NET),
        ('linear', (), NET[1:]),
        ('conv2d', (), NET[:1]),
        ('mlp', (), [name for name in NET if '.mlp.' in name]),
        ('mlp', r'.*\.1\..*', ['blocks.0.mlp.fc1', 'blocks.0.mlp.fc2']),
        ('all', ['stem', 'head'], NET[1:-1]),
        ('head', (), ['head']),
        (['head', 'stem'], (), ['stem', 'head']),
        (r'blocks\.\d+\.attn', (), ['blocks.0.attn', 'blocks.1.attn']),
        (r'blocks\.0\..*', (), NET[1:4]),
        (['conv2d', 'mlp', 'all'], (), NET),
    ],
)
def test_targets(targets, exclude, expected):
    """Presets and patterns match whole names; BatchNorm is never taken; the steps count down."""
    names, report = convert(Net(), targets, None, exclude=exclude)
    assert names == expected
    assert [row.timestep for row in report.layers] == list(range(len(expected), 0, -1))


def check_refused(model, message, x=None, error=ValueError, **options):
    """Converts a model, expecting a sentence and a model that stays as it was."""
    before, kinds = copied(model.state_dict()), [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(error, match=message) as caught:
        apply_denoiserep(model, **dict(targets='all', example_input=x) | options)
    assert '\n' not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(targets='hea'), r"'hea' matches no layer that can be denoised; near names: head"),
        (dict(targets=r'block\.0\.attn'), r'near names: blocks\.0\.attn'),
        (dict(targets=['all', 'tail']), "'tail' matches no layer"),
        (dict(targets='attn'), "'attn' matches no layer"),
        (dict(targets='norm'), "'norm' matches no layer"),
        (dict(targets='('), r"'\(' is no valid regular expression"),
        (dict(targets=[]), 'targets is empty: name a preset'),
        (dict(targets=5), '5 is not a regular expression'),
        (dict(targets=[5]), '5 is not a regular expression'),
        (dict(targets=None), 'None is not a regular expression'),
        (dict(targets={'pattern': 'head', 'rang': 2}), r'unknown: rang'),
        (dict(targets={'rank': 2}), 'must have a key pattern'),
        (dict(targets={'pattern': 'head', 'rank': 0}), 'head: the rank of a denoiser must be'),
        (dict(targets={'pattern': ['head']}), 'is not a regular expression'),
        (dict(exclude='['), 'is no valid regular expression'),
        (dict(exclude=[3]), '3 is not a regular expression'),
        (dict(exclude='.*'), "'all' matches no layer that can be denoised; it matches stem, but: it is excluded"),
        (dict(exclude=['head', 'blocks.0']), r"'blocks\.0' of exclude matches no layer; near names: blocks\.0\.attn"),
        (dict(rank=0), 'stem: the rank of a denoiser'),
        (dict(rank='full'), 'stem: the rank of a denoiser'),
        (dict(schedule=NoiseSchedule(num_timesteps=8)), '8 layers need as many timesteps; the schedule has 7'),
    ],
)
def test_bad_options(options, message):
    check_refused(Net(), message, **options)


def test_failure_half_way_restores_what_was_done():
    """An option that does not fit the last layer undoes the first ones, whatever the error is."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    check_refused(model, '1: a denoiser bias can only be fused', X, bias=True)

    class Broken(NoiseSchedule):
        def reverse_step(self, timestep):
            if timestep == 1:
                raise KeyboardInterrupt('stopped')
            return super().reverse_step(timestep)

    check_refused(model, 'stopped', X, KeyboardInterrupt, schedule=Broken())


def test_converting_twice_is_refused():
    """Also where one child was converted before, so the parts of a denoiser are never converted."""
    model = Net()
    convert(model, 'head', None)
    check_refused(model, 'has denoisers already')
    check_refused(denoised(nn.Linear(8, 8)), 'has denoisers already', X)


def test_overrides():
    """An entry's own options win over the common ones, and the first entry that matches decides."""
    model = Net()
    targets = ['head', {'pattern': r'.*\.attn', 'rank': 2, 'bias': False}, {'pattern': 'all', 'rank': 3}]
    convert(model, targets, None, rank=1)
    assert model.head.denoiser.down.shape == (1, 1, 8)
    assert model.blocks[1].attn.denoiser.down.shape == (1, 2, 8)
    assert model.blocks[1].attn.denoiser.bias is None
    assert model.blocks[1].mlp.fc2.denoiser.down.shape == (1, 3, 16)
    assert model.blocks[1].mlp.fc2.denoiser.bias is not None
    assert model.stem.denoiser.weight.shape == (1, 3, 3)


def test_bias_false_and_schedule():
    model, schedule = Net(), NoiseSchedule(num_timesteps=9)
    convert(model, x=None, bias=False, schedule=schedule)
    assert all(m.denoiser.bias is None for m in model.modules() if isinstance(m, DenoiseLayer))
    assert model.stem.schedule is schedule
    assert model.stem.timestep == 8


def test_the_model_itself():
    layer = nn.Linear(8, 4)
    assert convert(layer)[0] == ['']
    assert type(layer) is DenoiseLinear


def test_steps_count_down_in_execution_order():
    """The first executed layer gets t = N although it was registered last."""
    model = Chain(**linears('c', 'a', 'b'))
    names, report = convert(model)
    assert (names, report.order) == (['a', 'b', 'c'], 'execution')
    assert (model.a.timestep, model.b.timestep, model.c.timestep) == (3, 2, 1)


def test_first_call_counts():
    class Twice(Chain):
        def forward(self, x):
            return self.b(self.a(self.b(x)))

    assert convert(Twice(**linears('a', 'b')))[0] == ['b', 'a']


def test_failing_probe_says_so():
    """Where the dummy run fails the order is the one of registration, and the report gives the reason."""
    names, report = convert(Chain(**linears('c', 'a', 'b')), x=None)
    assert (names, report.order) == (['c', 'a', 'b'], 'registration')
    assert 'RuntimeError' in report.probe_failure
    assert 'registration order' in str(report)
    assert f'({report.probe_failure})' in str(report)


class Reader(Chain):
    def __init__(self, read):
        super().__init__(**linears('a', 'b'))
        self.read = read

    def forward(self, x):
        return self.read(self, self.b(self.a(x)))


@pytest.mark.parametrize(
    'read',
    [
        lambda model, x: F.linear(x, model.b.weight, model.b.bias),
        lambda model, x: x @ model.b.weight,
        lambda model, x: x @ model.b.weight.data,
        lambda model, x: x * model.b.weight.detach().norm(),
        lambda model, x: x + model.b.bias,
        lambda model, x: x + torch.stack([model.b.bias, model.b.bias])[0],
        lambda model, x: x + torch.cat((model.b.weight.flatten(), x.flatten()))[0],
    ],
)
def test_a_layer_whose_parameters_are_read_elsewhere_is_bypassed(read):
    check_converted(Reader(read), ['a'], 'bypassed')


@pytest.mark.parametrize(
    'read',
    [
        lambda model, x: x.reshape(-1, model.b.weight.shape[1]) * model.b.weight.numel(),
        lambda model, x: x.to(model.b.weight.dtype).to(model.b.weight.device),
        lambda model, x: x.to(model.b.weight),
        lambda model, x: x if model.b.weight.requires_grad and model.b.bias.is_contiguous() else x + 1,
        lambda model, x: x * model.b.weight.dim() * model.b.weight.size(0),
    ],
)
def test_reading_shape_dtype_or_device_is_no_bypass(read):
    check_converted(Reader(read), ['a', 'b'])


@pytest.mark.parametrize(
    'keep',
    [lambda layer: layer.weight.data, lambda layer: layer.weight.detach().t(), lambda layer: layer.bias.data[:4]],
)
def test_a_view_that_is_read_elsewhere(keep):
    """A view of a weight that the model keeps under no name is the weight, when it is read."""
    model = Chain(**linears('a', 'b'))
    view = keep(model.b)
    model.register_forward_hook(lambda module, args, output: output + view.sum())
    check_converted(model, ['a'], 'bypassed')


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    'make',
    [
        SelfAttention,
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ],
)
def test_attention_of_torch(make):
    """In eval mode nn.TransformerEncoderLayer reads the weights of its Linear layers without calling them."""
    report = check_converted(Chain(a=nn.Linear(8, 8), b=make()), ['a'], x=torch.randn(2, 5, 8))
    assert all('bypassed' in why for name, why in report.skipped.items() if 'out_proj' in name)


def test_never_executed():
    class Unused(Chain):
        def forward(self, x):
            return self.a(x)

    check_converted(Unused(**linears('a', 'b')), ['a'], 'not executed on the dummy image')


class ReadingConv(nn.Conv2d):
    """Has a forward of its own, as ConvWS."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Same(nn.Linear):
    """Changes nothing, which can't be known."""


def plain(kind):
    return nn.Conv2d(8, 8, 1) if kind == 'conv' else nn.Linear(8, 8)


def replaced_forward():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: F.linear(x, layer.weight).relu()
    return layer


def with_conv_forward():
    """A convolution that standardises its weight below its forward."""
    layer = plain('conv')
    standard = lambda self, x, w, b: F.conv2d(x, w / w.flatten(1).norm(dim=1)[:, None, None, None], b)  # noqa: E731
    layer._conv_forward = types.MethodType(standard, layer)
    return layer


def buffered():
    layer = nn.Linear(8, 8, bias=False)
    del layer.bias
    layer.register_buffer('bias', torch.ones(8))
    return layer


def expanded():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.randn(1, 8, dtype=torch.float64).expand(8, 8))
    return layer


def owning(kind, **attributes):
    layer = plain(kind)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    'layer, reason',
    [
        (ReadingConv(8, 8, 1), 'test_convert.ReadingConv may compute something else'),
        (ConvWS2d(8, 8, 1), r'ConvWS2d may compute something else'),
        (Same(8, 8), 'Same may compute something else'),
        (weight_norm(nn.Linear(8, 8)), 'not a parameter of its own'),
        (parametrizations.weight_norm(nn.Linear(8, 8)), 'may compute something else|not a parameter of its own'),
        (parametrizations.orthogonal(nn.Linear(8, 8)), 'may compute something else|not a parameter of its own'),
        (replaced_forward(), 'its forward was replaced'),
        (prune.l1_unstructured(plain('linear'), 'weight', 0.3), 'not a parameter of its own'),
        (prune.l1_unstructured(plain('linear'), 'bias', 0.3), 'not a parameter of its own'),
        (weight_norm(nn.Linear(8, 8), 'bias', dim=None), 'not a parameter of its own'),
        (spectral_norm(nn.Conv2d(8, 8, 1)), 'not a parameter of its own'),
        (buffered(), 'not a parameter of its own'),
        (expanded(), 'is expanded: several elements share memory'),
        (with_conv_forward(), '_conv_forward was replaced'),
        (owning('linear', timestep=3), 'for itself: timestep'),
        (owning('conv', schedule='cosine', vanilla_class=nn.Linear), 'schedule, vanilla_class'),
        (owning('linear', denoiser=nn.Linear(8, 8)), 'for itself: denoiser'),
        (owning('conv', _project=0.1), 'for itself: _project'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_odd_layers_are_skipped(layer, reason):
    """They stay as they are, the report or the error names the reason, and the rest fuses exactly."""
    kind = 'conv' if isinstance(layer, nn.Conv2d) else 'linear'
    model = Chain(a=plain(kind), b=layer).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    x = x[..., None, None] if kind == 'conv' else x
    attributes, layer_type = dict(layer.__dict__), type(layer)
    with pytest.raises(ValueError, match=f"'b' matches no layer that can be denoised; it matches b, but: .*({reason})"):
        apply_denoiserep(model, 'b', example_input=x)
    names, report = convert(model, x=x)
    assert names == ['a'] and re.search(reason, report.skipped['b'])
    assert layer.__dict__ == attributes and type(layer) is layer_type
    fused = fuse_model(randomise(model))
    assert relative(fused.eval()(x), model.eval()(x)) < 1e-9
    assert relative(model.b(x), model(x)) > 1e-3


def test_class_with_another_forward(monkeypatch):
    model = Chain(a=nn.Conv2d(8, 8, 1), b=nn.Flatten(), c=nn.Linear(8, 8))
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', lambda self, x, w, b: F.conv2d(x, w - w.mean(), b))
    check_converted(model, ['c'], '_conv_forward of its class', X[..., None, None])


@pytest.mark.parametrize(
    'call, skipped',
    [
        (lambda layer, x: layer.forward(x), True),
        (lambda layer, x: layer(input=x), True),
        (lambda layer, x: checkpoint(layer.forward, x, use_reentrant=False), True),
        (lambda layer, x: checkpoint(layer, x, use_reentrant=False), False),
        (lambda layer, x: nn.Sequential(layer)(x), False),
        (lambda layer, x: layer.__call__(x), False),
    ],
)
def test_calls_that_hooks_do_not_see(call, skipped):
    """A layer called by its forward, or by keyword, is skipped: training and fits listen with hooks."""

    class Net(Chain):
        def forward(self, x):
            return self.b(call(self.a, x).relu())

    model, x = Net(**linears('a', 'b')).double(), torch.randn(3, 8, dtype=torch.float64)
    names = ['b'] if skipped else ['a', 'b']
    check_converted(model, names, 'hooks', x)
    moments = collect_moments(model, {name: model.get_submodule(name) for name in names}, [x])
    assert all(seen.count for seen in moments.values())


def tie_embedding(layer):
    layer.table = nn.Embedding(8, 8)
    layer.weight = layer.table.weight


TIES = {
    'one parameter': lambda a, b: setattr(b, 'weight', a.weight),
    'one tensor': lambda a, b: setattr(b.weight, 'data', a.weight.data),
    'a tied autoencoder': lambda a, b: setattr(b, 'weight', nn.Parameter(a.weight.data.t())),
    'parts of a bias': lambda a, b: [part.register_buffer('copied', part.bias.data[2:]) for part in (a, b)],
    'embeddings': lambda a, b: [tie_embedding(part) for part in (a, b)],
}


@pytest.mark.parametrize('tie', TIES.values(), ids=TIES)
def test_layers_that_share_memory_are_skipped(tie):
    model = Chain(**linears('a', 'b', 'c'))
    tie(model.a, model.b)
    check_converted(model, ['c'], 'shared')


@pytest.mark.parametrize('halves', [lambda x: x.view(2, 8, 8), lambda x: (x[:, ::2], x[:, 1::2])])
def test_disjoint_parts_of_one_buffer_are_not_shared(halves):
    model = Chain(**linears('a', 'b'))
    model.a.weight.data, model.b.weight.data = halves(torch.randn(8, 16))
    check_converted(model, ['a', 'b'])


def test_shared_layer_is_converted_once():
    for targets in ('all', 'b', 'a'):
        model = Chain(**linears('a', 'c'))
        model.b = model.a
        names, report = convert(model, [targets, 'c'])
        assert names == ['a', 'c']
        assert [row.timestep for row in report.layers] == [2, 1]
        assert model.a is model.b


@pytest.mark.parametrize('rank', [None, 2])
def test_a_weight_of_another_size(rank):
    """The weight decides, not what the layer says of itself: users replace the first one for grey images."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).double()
    model[0].weight = nn.Parameter(model[0].weight.detach().sum(1, keepdim=True))
    assert image_channels(model) == 1
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert convert(model, x=x, rank=rank)[0] == ['0', '1']
    assert model[0].denoiser.weight.shape == (1, 1, 1)
    assert relative(fuse_model(randomise(model))(x), model(x)) < 1e-9


class Growing(Chain):
    """Resizes a buffer, makes a new one and a child, sets a flag and initialises a layer, each in its forward."""

    def __init__(self):
        super().__init__(a=nn.Linear(8, 8), b=nn.BatchNorm1d(8))
        self.register_buffer('seen', torch.zeros(0))
        self.register_buffer('first', torch.zeros(1, 8))
        self.ready = False

    def forward(self, x):
        self.seen.resize_(x.shape).copy_(x)
        self.first.resize_(1)
        self.register_buffer('new', x)
        self.child = nn.Identity()
        if not self.ready:
            self.b.weight.data.mul_(3)
            self.b.bias.data = x[0]
            self.ready = True
        return self.b(self.a(x))


def test_probe_undoes_what_the_forward_does():
    """Buffers that are resized (fake quantisers, caches) or made, flags and values come back."""
    model = Growing()
    before = {key: (value, value.detach().clone()) for key, value in model.state_dict(keep_vars=True).items()}
    attributes = [set(module.__dict__) for module in model.modules()]
    names, report = convert(model)
    assert (names, report.order, model.ready) == (['a'], 'execution', False)
    after = {key: value for key, value in model.state_dict(keep_vars=True).items() if 'denoiser' not in key}
    assert list(after) == list(before)
    assert all(after[key] is value and torch.equal(value, kept) for key, (value, kept) in before.items())
    model.a.__class__ = nn.Linear
    parts = [part for name, part in model.named_modules() if 'denoiser' not in name]
    assert [set(part.__dict__) - {'timestep', 'schedule', 'vanilla_class'} for part in parts] == attributes


def test_scripted_and_lazy_parts():
    """A scripted part is run as it is; a lazy layer, which has no size yet, is refused with what to do."""
    model = Chain(a=nn.Linear(8, 8), b=torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    assert check_converted(model, ['a']).order == 'execution'
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match='lazy parameters'):
        convert(model)
    assert type(model[1]) is nn.LazyLinear
    model(X)
    assert convert(model)[0] == ['0', '1']


def test_probe_of_a_model_that_draws():
    """What a random forward reaches does not depend on the seed (processes must agree), and numpy's state stays."""

    class Gambling(Chain):
        def forward(self, x):
            return self.a(x) if np.random.rand() + random.random() + torch.rand(()).item() > 1.5 else self.b(x)

    found = []
    for seed in range(6):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = str(np.random.get_state())
        found.append(convert(Gambling(**linears('a', 'b')))[0])
        assert str(np.random.get_state()) == before
    assert all(names == found[0] for names in found)


def test_efficient_conv_bn_eval():
    """mmengine's setting is refused with a sentence; mmcv's, on one module, computes what the layers define."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    convert(model, x=torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match='efficient_conv_bn_eval'):
        turn_on_efficient_conv_bn_eval_for_single_model(model)

    model = mmcv.cnn.ConvModule(3, 8, 3, norm_cfg={'type': 'BN'}).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    convert(model, x=x, rank=None)
    expected = randomise(model)(x)
    model.turn_on_efficient_conv_bn_eval()
    assert relative(model(x), expected) < 1e-9
    assert relative(fuse_model(model)(x), expected) < 1e-9


@pytest.mark.parametrize('layer', [mmcv.cnn.Linear(8, 8), mmcv.cnn.bricks.wrappers.Conv2d(8, 8, 1)])
def test_mmcv_wrappers(layer):
    kind, x = type(layer), X if isinstance(layer, nn.Linear) else X[..., None, None]
    model = Chain(a=layer)
    assert kind not in (nn.Linear, nn.Conv2d)
    report = check_converted(model, ['a'], x=x)
    assert report.layers[0].type == kind.__name__
    assert type(model.a) in (DenoiseLinear, DenoiseConv2d)
    assert type(fuse_model(model).a) is kind


def test_same_objects_and_names():
    """Modules and parameters stay the same objects; denoisers inherit dtype and requires_grad."""
    model = Net().bfloat16()
    model.stem.requires_grad_(False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert convert(model, x=None)[1].order == 'execution'
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert all('.denoiser.' in name for name in set(after) - set(parameters))
    assert all(parameter.requires_grad is not name.startswith('stem.') for name, parameter in after.items())
    assert all(parameter.dtype == torch.bfloat16 for parameter in after.values())


class Caching(Chain):
    """Reads a cache in eval mode that only eval() makes, as LeViT's attention does, and freezes a layer in train()."""

    def __init__(self, make):
        super().__init__(**linears('a', 'b', 'c'))
        self.make = make

    def train(self, mode=True):
        super().train(mode)
        self.__dict__.pop('cache', None)
        if not mode:
            self.cache = self.make(self)
        self.c.requires_grad_(False)

    def forward(self, x):
        x = super().forward(x)
        return x if self.training else x + self.cache


@pytest.mark.parametrize('train', [True, False])
def test_cache_of_eval_mode(train):
    """The dry run makes the cache that eval mode needs; the model's own cache and flags are left as they were."""
    model = Caching(lambda model: torch.ones(8))
    if not train:
        model.eval()
        model.c.requires_grad_(True)
    cache = model.__dict__.get('cache')
    names, report = convert(model)
    assert (names, report.order) == (['a', 'b', 'c'], 'execution')
    assert model.__dict__.get('cache') is cache
    assert all(module.training == train for name, module in model.named_modules() if 'denoiser' not in name)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert verify_fusion(randomise(model), example_input=X).ok


def test_weight_read_by_eval_is_bypassed():
    """A weight that eval() keeps for the forward is read outside of its layer, although not in the forward."""
    check_converted(Caching(lambda model: 2 * model.b.bias), ['a', 'c'], 'bypassed')


class Restless(Net):
    """A network whose forward changes and replaces buffers, draws random numbers, and holds an expanded buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('sides', torch.zeros(3))
        self.register_buffer('expanded', torch.zeros(1).expand(4))

    def forward(self, x):
        self.calls += 1
        self.sides = torch.zeros(x.shape[-1])
        torch.rand(3)
        return super().forward(x)


@pytest.mark.parametrize('size', [16, 2], ids=['probe runs', 'probe fails'])
@pytest.mark.parametrize('train', [True, False])
def test_probe_leaves_no_trace(train, size):
    """BatchNorm, buffers, train flags, random states, gradients and hooks are as they were, even if the probe fails."""
    model = randomise(Restless().train(train))
    model.norm.eval()
    model.head.register_forward_hook(lambda *args: None)

    def facts():
        parts = [part for name, part in model.named_modules() if 'denoiser' not in name]
        return [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts]

    buffers, before, states = copied(dict(model.named_buffers())), facts(), random_states()
    report = apply_denoiserep(model, 'head', example_input=torch.randn(1, 3, size, size, generator=torch.Generator()))
    assert report.order == ('execution' if size == 16 else 'registration')
    assert equal(dict(model.named_buffers()), buffers)
    assert facts() == before and random_states() == states
    assert all('forward' not in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_switch_to_deploy():
    """RepVGG refuses to merge its branches while it has denoisers, and does so once they are fused."""
    torch.manual_seed(0)
    arch = dict(num_blocks=[1] * 4, width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None)
    model = randomise(RepVGG(arch, base_channels=32))
    x = torch.randn(1, 3, 32, 32)
    apply_denoiserep(model, 'all', example_input=x)
    randomise(model)
    with pytest.raises(RuntimeError, match=r'fuse_model\(model\) first'):
        model.switch_to_deploy()
    assert any(isinstance(module, DenoiseLayer) for module in model.modules())
    fused = fuse_model(model)
    assert verify_fusion(model, fused, x).ok
    fused.switch_to_deploy()
    assert verify_fusion(model, fused, x).ok
    with pytest.raises(RuntimeError, match='fuse_model'):
        model.switch_to_deploy()


class Branches(nn.Module):
    """Two convolutions that become one; `fuse` of features is part of its forward."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def merge(self, verbose=False):
        self.large.weight.data += F.pad(self.small.weight.data, (1, 1, 1, 1))
        self.large.bias.data += self.small.bias.data
        one = nn.Conv2d(4, 4, 3, padding=1, dtype=self.large.weight.dtype)
        one.load_state_dict({'weight': self.large.weight, 'bias': self.large.bias})
        self.large, self.small = one, None

    def fuse(self, x, y):
        return x if y is None else x + y

    def forward(self, x):
        return self.fuse(self.large(x), self.small and self.small(x))


@pytest.mark.parametrize('name', ['merge_kernel', 'reparameterize', 'local_inject'])
def test_merging_by_other_names(name):
    """Blocks that merge themselves (RepLKNet, RepMLP, timm's) refuse it too; a `fuse` that takes features stays."""
    torch.manual_seed(0)
    model = nn.Sequential(type('Block', (Branches,), {name: Branches.merge})(), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    apply_denoiserep(model, 'all', example_input=x)
    expected = randomise(model)(x)
    with pytest.raises(RuntimeError, match=name):
        getattr(model[0], name)()
    fused = fuse_model(model)
    getattr(fused[0], name)()
    assert fused[0].small is None
    assert relative(fused(x), expected) < 1e-9


def test_report():
    model = Net()
    before = sum(parameter.numel() for parameter in model.parameters())
    model.extra = nn.Linear(8, 8)
    _, report = convert(model, x=None)
    extra = sum(parameter.numel() for name, parameter in model.named_parameters() if '.denoiser.' in name)
    assert report.parameters == before + 72
    assert report.extra_parameters == extra == sum(row.extra_parameters for row in report.layers)
    text, lines = str(report), str(report).splitlines()
    assert lines[0].split() == ['layer', 'type', 'weight', 'step', 'extra', 'parameters']
    assert lines[2].split() == ['stem', 'Conv2d', '8x3x4x4', '8', '12']
    assert lines[5].split() == ['blocks.0.mlp.fc2', 'Linear', '8x16', '5', '272']
    assert f'8 layers denoised, steps 8 to 1 in execution order; {extra:,} extra parameters' in text
    assert 'not executed on the dummy image' in text
    assert 'warning' not in text

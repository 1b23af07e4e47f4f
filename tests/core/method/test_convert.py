"""Tests of the conversion: which layers, in which order, with which options, and what is skipped and why."""

import copy
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

from helpers import denoised, randomise, relative
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
        """Run the children."""
        for name in sorted(self._modules):
            x = self._modules[name](x)
        return x


def chain(*names):
    """A chain of Linear(8, 8) layers."""
    return Chain(**{name: nn.Linear(8, 8) for name in names})


class Mlp(Chain):
    """fc1, fc2."""

    def __init__(self):
        super().__init__(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8))


class Net(nn.Module):
    """A small network: a stem conv, two blocks with an attention projection and an MLP, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(Chain(attn=nn.Linear(8, 8), mlp=Mlp()) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        """(B, 3, H, W) to (B, 4)."""
        x = self.stem(x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(self.norm(x)))


NET = ['stem', *(f'blocks.{i}.{n}' for i in '01' for n in ('attn', 'mlp.fc1', 'mlp.fc2')), 'head']


def convert(model, targets='all', x=X, **options):
    """Convert a model of Linear(8, ...) layers and return the names in the order of the report, and the report."""
    report = apply_denoiserep(model, targets, example_input=x, **options)
    names = [row.name for row in report.layers]
    assert {n for n, m in model.named_modules() if isinstance(m, DenoiseLayer)} == set(names)
    return names, report


# Targets


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
    """Presets and patterns that match the whole name take these layers, and BatchNorm is never one of them."""
    names, report = convert(Net(), targets, None, exclude=exclude)
    assert names == expected
    assert [row.timestep for row in report.layers] == list(range(len(expected), 0, -1))


@pytest.mark.parametrize(
    'targets, message',
    [
        ('hea', r"'hea' matches no layer that can be denoised; near names: head"),
        (r'block\.0\.attn', r'near names: blocks\.0\.attn'),
        (['all', 'tail'], "'tail' matches no layer"),
        ('attn', "'attn' matches no layer"),
        ('norm', "'norm' matches no layer"),
        ('(', r"'\(' is no valid regular expression"),
        ([], 'targets is empty: name a preset'),
        (5, '5 is not a regular expression'),
        ([5], '5 is not a regular expression'),
        (None, 'None is not a regular expression'),
        ({'pattern': 'head', 'rang': 2}, r'unknown: rang'),
        ({'rank': 2}, 'must have a key pattern'),
        ({'pattern': 'head', 'rank': 0}, 'head: the rank of a denoiser must be'),
        ({'pattern': ['head']}, 'is not a regular expression'),
    ],
)
def test_bad_targets(targets, message):
    """A target that is malformed or takes nothing is an error with one sentence, and the model stays as it was."""
    check_refused(Net(), message, targets)


def check_refused(model, message, targets='all', x=None, error=ValueError, **options):
    """Convert a model, expecting an error that leaves it as it was."""
    before, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(error, match=message) as caught:
        apply_denoiserep(model, targets, example_input=x, **options)
    assert '\n' not in str(caught.value)
    assert [type(module) for module in model.modules()] == types
    assert [set(module.__dict__) for module in model.modules()] == attributes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'exclude': '['}, 'is no valid regular expression'),
        ({'exclude': [3]}, '3 is not a regular expression'),
        ({'exclude': '.*'}, "'all' matches no layer that can be denoised; it matches stem, but: it is excluded"),
        ({'exclude': ['head', 'blocks.0']}, r"'blocks\.0' of exclude matches no layer; near names: blocks\.0\.attn"),
        ({'rank': 0}, 'stem: the rank of a denoiser'),
        ({'rank': 'full'}, 'stem: the rank of a denoiser'),
        ({'schedule': NoiseSchedule(num_timesteps=8)}, '8 layers need as many timesteps; the schedule has 7'),
    ],
)
def test_bad_options(options, message):
    """The same for the other options."""
    check_refused(Net(), message, **options)


def test_failure_half_way_restores_what_was_done():
    """An option that does not fit the last layer undoes the first ones, whatever the error is."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    check_refused(model, '1: a denoiser bias can only be fused', x=X, bias=True)

    class Broken(NoiseSchedule):
        def reverse_step(self, timestep):
            if timestep == 1:
                raise KeyboardInterrupt('stopped')
            return super().reverse_step(timestep)

    check_refused(model, 'stopped', x=X, error=KeyboardInterrupt, schedule=Broken())


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
    """`bias=False` leaves every denoiser without a bias; the schedule reaches the layers."""
    model, schedule = Net(), NoiseSchedule(num_timesteps=9)
    convert(model, x=None, bias=False, schedule=schedule)
    assert all(m.denoiser.bias is None for m in model.modules() if isinstance(m, DenoiseLayer))
    assert model.stem.schedule is schedule
    assert model.stem.timestep == 8


def test_position_bias_mlp():
    """Presets leave SwinV2's cpb_mlp out; a pattern may name it."""
    model = Chain(a=chain('a', 'b'), cpb_mlp=chain('0', '1'))
    assert convert(copy.deepcopy(model))[0] == ['a.a', 'a.b']
    assert convert(copy.deepcopy(model), r'cpb_mlp\.1')[0] == ['cpb_mlp.1']


def test_the_model_itself():
    """A single layer can be converted; its name is empty."""
    layer = nn.Linear(8, 4)
    assert convert(layer)[0] == ['']
    assert type(layer) is DenoiseLinear


# Order and bypasses


def test_steps_count_down_in_execution_order():
    """The first executed layer gets t = N although it was registered last."""
    model = chain('c', 'a', 'b')
    names, report = convert(model)
    assert names == ['a', 'b', 'c']
    assert report.order == 'execution'
    assert (model.a.timestep, model.b.timestep, model.c.timestep) == (3, 2, 1)


def test_first_call_counts():
    """A layer that runs twice has the place of its first call."""

    class Twice(Chain):
        def forward(self, x):
            return self.b(self.a(self.b(x)))

    assert convert(Twice(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))[0] == ['b', 'a']


def test_failing_probe_says_so():
    """Where the dummy run fails the order is the one of registration, and the report gives the reason."""
    model = chain('c', 'a', 'b')
    names, report = convert(model, x=None)
    assert names == ['c', 'a', 'b']
    assert report.order == 'registration'
    assert 'RuntimeError' in report.probe_failure
    assert 'registration order' in str(report)
    assert f'({report.probe_failure})' in str(report)


class Reader(Chain):
    """Calls all its children and applies a function to a layer's parameters besides."""

    def __init__(self, read, **children):
        super().__init__(**children)
        self.read = read

    def forward(self, x):
        """Run the children, then read."""
        return self.read(self, super().forward(x))


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
def test_bypassed(read):
    """A layer whose weight or bias is used outside of its own forward is skipped."""
    model = Reader(read, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    names, report = convert(model)
    assert names == ['a']
    assert list(report.skipped) == ['b']
    assert 'bypassed' in report.skipped['b']
    assert verify_fusion(randomise(model), example_input=X).ok


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
def test_harmless_reads(read):
    """Reading a weight's shape, dtype or device is no bypass."""
    model = Reader(read, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    assert convert(model)[0] == ['a', 'b']
    assert verify_fusion(randomise(model), example_input=X).ok


def test_multihead_attention():
    """nn.MultiheadAttention reads its out_proj: skipped; the layer beside it is exact."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.after = nn.Linear(8, 8)

        def forward(self, x):
            return self.after(self.attention(x, x, x)[0])

    x = torch.randn(2, 5, 8)
    model = Attention()
    names, report = convert(model, x=x)
    assert names == ['after']
    assert list(report.skipped) == ['attention.out_proj']
    assert 'bypassed' in report.skipped['attention.out_proj']
    assert verify_fusion(randomise(model), example_input=x).ok


@pytest.mark.parametrize('depth', [1, 2])
def test_transformer_encoder_fast_path(depth):
    """In eval mode nn.TransformerEncoderLayer reads the weights of its Linear layers without calling them."""
    x = torch.randn(2, 5, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Chain(a=nn.Linear(8, 8), b=nn.TransformerEncoder(layer, depth))
    names, report = convert(model, x=x)
    assert names == ['a']
    assert len(report.skipped) == 3 * depth
    assert verify_fusion(randomise(model), example_input=x).ok


def test_never_executed():
    """A layer that the dummy run never calls is skipped."""

    class Unused(Chain):
        def forward(self, x):
            return self.a(x)

    names, report = convert(Unused(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    assert names == ['a']
    assert report.skipped == {'b': 'not executed on the dummy image'}


class ReadingConv(nn.Conv2d):
    """A subclass with a forward of its own, as ConvWS."""

    def forward(self, x):
        """Standardise the weight."""
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Same(nn.Linear):
    """A subclass that changes nothing, which can't be known."""


def replaced_forward():
    """A layer with another forward put on the object."""
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: F.linear(x, layer.weight).relu()
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
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_are_not_plain(layer, reason):
    """They stay as they are and the report names the reason; alone, the error names it."""
    x = X[..., None, None] if isinstance(layer, nn.Conv2d) else X
    plain = nn.Conv2d(8, 8, 1) if isinstance(layer, nn.Conv2d) else nn.Linear(8, 8)
    model = Chain(a=plain, b=layer)
    kind = type(layer)
    with pytest.raises(ValueError, match=f"'b' matches no layer that can be denoised; it matches b, but: .*({reason})"):
        apply_denoiserep(model, 'b', example_input=x)
    names, report = convert(model, x=x)
    assert names == ['a']
    assert type(layer) is kind
    assert re.search(reason, report.skipped['b'])
    assert verify_fusion(randomise(model), example_input=x).ok


def plain(kind):
    """The layer that a test makes odd."""
    return nn.Conv2d(8, 8, 1) if kind == 'conv' else nn.Linear(8, 8)


def pruned(name):
    """A layer whose weight or bias is the product of a parameter and a mask."""
    return prune.l1_unstructured(plain('linear'), name, 0.3)


def with_conv_forward(layer):
    """A convolution that standardises its weight below its forward."""
    standard = lambda self, x, w, b: F.conv2d(x, w / w.flatten(1).norm(dim=1)[:, None, None, None], b)  # noqa: E731
    layer._conv_forward = types.MethodType(standard, layer)
    return layer


def buffered():
    """A layer whose bias is a buffer (a frozen bias, say)."""
    layer = nn.Linear(8, 8, bias=False)
    del layer.bias
    layer.register_buffer('bias', torch.ones(8))
    return layer


def owning(layer, **attributes):
    """A layer with attributes of the user's own."""
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    'layer, reason',
    [
        (pruned('weight'), 'not a parameter of its own'),
        (pruned('bias'), 'not a parameter of its own'),
        (weight_norm(nn.Linear(8, 8), 'bias', dim=None), 'not a parameter of its own'),
        (spectral_norm(nn.Conv2d(8, 8, 1)), 'not a parameter of its own'),
        (buffered(), 'not a parameter of its own'),
        (with_conv_forward(plain('conv')), '_conv_forward was replaced'),
        (owning(plain('linear'), timestep=3), 'for itself: timestep'),
        (owning(plain('conv'), schedule='cosine', vanilla_class=nn.Linear), 'schedule, vanilla_class'),
        (owning(plain('linear'), denoiser=nn.Linear(8, 8)), 'for itself: denoiser'),
        (owning(plain('conv'), _project=0.1), 'for itself: _project'),
    ],
)
def test_odd_layers_are_skipped(layer, reason):
    """What is no plain layer, or has attributes that a denoiser would replace, is skipped; the rest fuses exactly."""
    kind = 'conv' if isinstance(layer, nn.Conv2d) else 'linear'
    model = Chain(a=plain(kind), b=layer).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    x = x[..., None, None] if kind == 'conv' else x
    attributes = dict(layer.__dict__)
    names, report = convert(model, x=x)
    assert names == ['a']
    assert reason in report.skipped['b']
    assert layer.__dict__ == attributes
    fused = fuse_model(randomise(model))
    assert relative(fused.eval()(x), model.eval()(x)) < 1e-9
    assert relative(model.b(x), model(x)) > 1e-3


def test_class_with_another_forward(monkeypatch):
    """A forward that was replaced on the class, for all convolutions, is found as well."""
    standard = lambda self, x, w, b: F.conv2d(x, w - w.mean(), b)  # noqa: E731
    model = Chain(a=nn.Conv2d(8, 8, 1), b=nn.Flatten(), c=nn.Linear(8, 8))
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', standard)
    names, report = convert(model, x=X[..., None, None])
    assert names == ['c']
    assert '_conv_forward of its class' in report.skipped['a']


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

    model = Net(a=nn.Linear(8, 8), b=nn.Linear(8, 8)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    names, report = convert(model, x=x)
    assert names == (['b'] if skipped else ['a', 'b'])
    assert not skipped or 'hooks' in report.skipped['a']
    assert relative(fuse_model(randomise(model))(x), model(x)) < 1e-9
    moments = collect_moments(model, {name: model.get_submodule(name) for name in names}, [x])
    assert all(seen.count for seen in moments.values())


def test_layers_that_share_memory():
    """Parameters that are views of the same numbers are tied; disjoint parts of one flat buffer are not."""

    def check(model, expected):
        names, report = convert(model)
        assert names == expected
        assert all('shared' in reason for reason in report.skipped.values())
        assert set(names) | set(report.skipped) == set(model._modules)

    model = chain('a', 'b', 'c')
    model.b.weight.data = model.a.weight.data
    check(model, ['c'])
    model = chain('a', 'b', 'c')
    model.c.weight = nn.Parameter(model.a.weight.data.t())  # a tied autoencoder
    check(model, ['b'])
    model = chain('a', 'b')
    model.a.register_buffer('copy_of_bias', model.a.bias.data[2:])
    check(model, ['b'])
    model = chain('a', 'b')
    flat = torch.randn(128)
    model.a.weight.data, model.b.weight.data = flat[:64].view(8, 8), flat[64:].view(8, 8)
    check(model, ['a', 'b'])
    model = chain('a', 'b')
    both = torch.randn(8, 16)
    model.a.weight.data, model.b.weight.data = both[:, ::2], both[:, 1::2]
    check(model, ['a', 'b'])
    assert verify_fusion(randomise(model), example_input=X).ok


@pytest.mark.parametrize(
    'keep',
    [lambda layer: layer.weight.data, lambda layer: layer.weight.detach().t(), lambda layer: layer.bias.data[:4]],
)
def test_a_view_that_is_read_elsewhere(keep):
    """A view of a weight that the model keeps under no name is the weight, when it is read."""
    model = chain('a', 'b')
    view = keep(model.b)
    model.register_forward_hook(lambda module, args, output: output + view.sum())
    names, report = convert(model)
    assert names == ['a']
    assert 'bypassed' in report.skipped['b']


def test_a_weight_of_another_size():
    """The weight decides, not what the layer says of itself: users replace the first one for grey images."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).double()
    model[0].weight = nn.Parameter(model[0].weight.detach().sum(1, keepdim=True))
    assert image_channels(model) == 1
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for rank in (None, 2):
        copied = copy.deepcopy(model)
        assert convert(copied, x=x, rank=rank)[0] == ['0', '1']
        assert copied[0].denoiser.weight.shape == (1, 1, 1)
        assert relative(fuse_model(randomise(copied))(x), copied(x)) < 1e-9


class Growing(Chain):
    """Resizes a buffer, makes a new one and a child, sets a flag and initialises a layer, each in its forward."""

    def __init__(self):
        super().__init__(a=nn.Linear(8, 8), b=nn.BatchNorm1d(8))
        self.register_buffer('seen', torch.zeros(0))
        self.register_buffer('first', torch.zeros(1, 8))
        self.ready = False

    def forward(self, x):
        """Leave traces."""
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
    for key, (value, kept) in before.items():
        assert after[key] is value
        assert torch.equal(value, kept)
    model.a.__class__ = nn.Linear
    parts = [part for name, part in model.named_modules() if 'denoiser' not in name]
    assert [set(part.__dict__) - {'timestep', 'schedule', 'vanilla_class'} for part in parts] == attributes


def test_scripted_and_lazy_parts():
    """A scripted part is run as it is; a lazy layer, which has no size yet, is refused with what to do."""
    model = Chain(a=nn.Linear(8, 8), b=torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    names, report = convert(model)
    assert (names, report.order) == (['a'], 'execution')
    assert verify_fusion(randomise(model), example_input=X).ok
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
        found.append(convert(Gambling(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))[0])
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


def test_tied_weights():
    """Layers that share a weight are skipped, also where the other one is an embedding."""
    model = chain('a', 'b', 'c')
    model.b.weight = model.a.weight
    names, report = convert(model)
    assert names == ['c']
    assert set(report.skipped) == {'a', 'b'}
    assert all('shared with another layer' in reason for reason in report.skipped.values())

    model = chain('a', 'b')
    model.table = nn.Embedding(8, 8)
    model.b.weight = model.table.weight
    model.forward = lambda x: model.b(model.a(x))
    assert convert(model)[0] == ['a']


def test_shared_layer_is_converted_once():
    """A layer in two places gets one denoiser and one step, and matches by either name."""
    layer = nn.Linear(8, 8)
    for targets in ('all', 'b', 'a'):
        model = Chain(a=copy.deepcopy(layer), c=nn.Linear(8, 8))
        model.b = model.a
        names, report = convert(model, [targets, 'c'])
        assert names == ['a', 'c']
        assert [row.timestep for row in report.layers] == [2, 1]
        assert model.a is model.b


@pytest.mark.parametrize('layer', [mmcv.cnn.Linear(8, 8), mmcv.cnn.bricks.wrappers.Conv2d(8, 8, 1)])
def test_mmcv_wrappers(layer):
    """mmcv's own Linear and Conv2d are converted, and come back as what they were."""
    kind, x = type(layer), X if isinstance(layer, nn.Linear) else X[..., None, None]
    model = Chain(a=layer)
    assert kind not in (nn.Linear, nn.Conv2d)
    names, report = convert(model, x=x)
    assert names == ['a']
    assert report.layers[0].type == kind.__name__
    assert type(model.a) in (DenoiseLinear, DenoiseConv2d)
    fused = fuse_model(randomise(model))
    assert type(fused.a) is kind
    assert verify_fusion(model, fused, x).ok


# What stays as it is


def test_converting_twice_is_refused():
    """Also where one child was converted before; so the parts of a denoiser are never converted."""
    model = Net()
    convert(model, 'head', None)
    check_refused(model, 'has denoisers already')
    check_refused(denoised(nn.Linear(8, 8)), 'has denoisers already', x=X)


def test_same_objects_and_names():
    """Modules and parameters stay the same objects under the same names."""
    model = Net()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    convert(model, x=None)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert all('.denoiser.' in name for name in set(after) - set(parameters))


def test_requires_grad_is_inherited():
    """Denoisers of frozen layers are frozen."""
    model = Net()
    model.stem.requires_grad_(False)
    convert(model, x=None)
    assert not any(parameter.requires_grad for parameter in model.stem.parameters())
    assert all(parameter.requires_grad for parameter in model.head.parameters())


def test_dtype_is_inherited():
    """Denoisers of a half-precision model are in half precision."""
    model = Net().bfloat16()
    _, report = convert(model, x=None)
    assert report.order == 'execution'
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


class Restless(Net):
    """A network whose forward changes and replaces buffers, draws random numbers, and holds an expanded buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('sides', torch.zeros(3))
        self.register_buffer('expanded', torch.zeros(1).expand(4))

    def forward(self, x):
        """Leave traces."""
        self.calls += 1
        self.sides = torch.zeros(x.shape[-1])
        torch.rand(3)
        return super().forward(x)


class Caching(Chain):
    """Reads a cache in eval mode that only eval() makes, as LeViT's attention does, and freezes a layer in train()."""

    def __init__(self, make, **children):
        super().__init__(**children)
        self.make = make

    def train(self, mode=True):
        """Renew or drop the cache, and freeze as backbones with frozen stages do."""
        super().train(mode)
        self.__dict__.pop('cache', None)
        if not mode:
            self.cache = self.make(self)
        self.c.requires_grad_(False)

    def forward(self, x):
        """Run the children and use the cache."""
        x = super().forward(x)
        return x if self.training else x + self.cache


@pytest.mark.parametrize('train', [True, False])
def test_cache_of_eval_mode(train):
    """The dry run makes the cache that eval mode needs; the model's own cache and flags are left as they were."""
    model = Caching(lambda model: torch.ones(8), a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
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
    model = Caching(lambda model: 2 * model.b.bias, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    names, report = convert(model)
    assert names == ['a', 'c']
    assert 'bypassed' in report.skipped['b']
    assert verify_fusion(randomise(model), example_input=X).ok


@pytest.mark.parametrize('size', [16, 2], ids=['probe runs', 'probe fails'])
@pytest.mark.parametrize('train', [True, False])
def test_probe_leaves_no_trace(train, size):
    """BatchNorm, buffers, train flags, random states, gradients and hooks are as they were, even if the probe fails."""
    model = randomise(Restless().train(train))
    model.norm.eval()
    model.head.register_forward_hook(lambda *args: None)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    report = apply_denoiserep(model, 'head', example_input=torch.randn(1, 3, size, size, generator=torch.Generator()))
    assert report.order == ('execution' if size == 16 else 'registration')
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert [m.training for n, m in model.named_modules() if 'denoiser' not in n] == modes
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules() if 'denoiser' not in n]
    assert after == hooks
    assert all('forward' not in module.__dict__ for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_switch_to_deploy():
    """RepVGG refuses to merge its branches while it has denoisers, and does so once they are fused."""
    torch.manual_seed(0)
    arch = {
        'num_blocks': [1, 1, 1, 1],
        'width_factor': [0.125, 0.125, 0.125, 0.125],
        'group_layer_map': None,
        'se_cfg': None,
    }
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
        """Makes one convolution."""
        self.large.weight.data += F.pad(self.small.weight.data, (1, 1, 1, 1))
        self.large.bias.data += self.small.bias.data
        one = nn.Conv2d(4, 4, 3, padding=1, dtype=self.large.weight.dtype)
        one.load_state_dict({'weight': self.large.weight, 'bias': self.large.bias})
        self.large, self.small = one, None

    def fuse(self, x, y):
        """Is no merging of weights."""
        return x if y is None else x + y

    def forward(self, x):
        """Run what is there."""
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


@pytest.mark.parametrize('rank', [None, 2])
def test_vanilla_checkpoint(rank):
    """It loads into the denoised model: missing keys exactly the denoisers, unexpected none, same outputs."""
    vanilla, model = Net().eval(), Net().eval()
    convert(model, x=None, rank=rank)
    result = model.load_state_dict(vanilla.state_dict(), strict=False)
    expected = {name for name, _ in model.named_parameters() if '.denoiser.' in name}
    assert set(result.missing_keys) == expected
    assert len(expected) >= len(NET)
    assert not result.unexpected_keys
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), vanilla(x))


def test_report():
    """The report prints every column of every layer, the sums, and what was skipped."""
    model = Net()
    before = sum(parameter.numel() for parameter in model.parameters())
    model.extra = nn.Linear(8, 8)
    _, report = convert(model, x=None)
    extra = sum(parameter.numel() for name, parameter in model.named_parameters() if '.denoiser.' in name)
    assert report.parameters == before + 72
    assert report.extra_parameters == extra == sum(row.extra_parameters for row in report.layers)
    lines = str(report).splitlines()
    assert lines[0].split() == ['layer', 'type', 'weight', 'step', 'extra', 'parameters']
    assert lines[2].split() == ['stem', 'Conv2d', '8x3x4x4', '8', '12']
    assert lines[5].split() == ['blocks.0.mlp.fc2', 'Linear', '8x16', '5', '272']
    text = '\n'.join(lines)
    assert f'8 layers denoised, steps 8 to 1 in execution order; {extra:,} extra parameters' in text
    assert 'not executed on the dummy image' in text
    assert 'warning' not in text

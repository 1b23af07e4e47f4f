"""Fits of plain models to the domain of unlabelled images: by their definition, exact in the weights, or refused."""

import copy
import itertools
import re
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from mmpretrain.models import ResNet, SwinTransformer, VisionTransformer
from torch import nn

from calibration_helpers import (
    CLEAN,
    LAYERS,
    NOISY,
    PIXELS,
    TOKENS,
    Branch,
    Experts,
    Loop,
    Net,
    Recurrent,
    Second,
    built,
    changed,
    data,
    fit,
    gap,
    gather,
    notes,
    supporting,
    with_maps,
)
from helpers import equal, relative, signature
from mmdenoiserep.core import (
    CalibrationError,
    Moments,
    Support,
    apply_denoiserep,
    compare_models,
    explicit_maps,
    fit_domain,
    fuse_model,
    select_layers,
    transport,
)
from mmdenoiserep.core.calibration.domain import STRENGTH
from mmdenoiserep.core.calibration.features import Features
from mmdenoiserep.core.calibration.halves import ImageVectors
from mmdenoiserep.core.calibration.match import find_support

WHOLE = [torch.cat(NOISY)]

# By the definition

VIT = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
SWIN = dict(embed_dims=16, depths=[2, 2], num_heads=[2, 4])
BACKBONES = {
    'resnet': (lambda: ResNet(18, stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3)), 32),
    'vit': (lambda: VisionTransformer(VIT, img_size=32, patch_size=8, out_type='featmap'), 32),
    'swin': (lambda: SwinTransformer(SWIN, img_size=56, out_indices=(0, 1)), 56),
}
NORMS = ((r'conv(\d)', r'bn\1'), (r'downsample\.0', 'downsample.1'), ('reduction', 'norm'))
"""Names of layers without a bias, and of the norms that take their constant."""


def flowing(model, name, images):
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_hook(
        lambda _, args, output: seen.append(output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else args[0])
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).mT[None]


@torch.no_grad()
def fit_by_definition(model, names, clean, noisy, support=None):
    """Fits layer after layer, each with a full pass of its own over the model as it is by then."""
    source = {name: Moments.of(flowing(model, name, clean)) for name in names}
    for name in names:
        layer, norm = model.get_submodule(name), name
        for pattern, replacement in NORMS:
            norm = re.sub(pattern, replacement, norm)
        seen, target = ImageVectors(Features(nn.Linear(source[name].mean.shape[1], 1))), flowing(model, name, noisy)
        seen.add(target, len(noisy))
        factor = source[name].factor()
        share = Support(*support) if support else find_support(source[name], seen.halves(factor), factor)
        strength = 1.0 if support or name == names[0] else STRENGTH
        linear, constant = (x[0] for x in transport(source[name], Moments.of(target), share, strength=strength))
        weight = layer.weight.clone()
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_((linear @ weight.flatten(1)).view_as(weight))
            if layer.bias is None:
                model.get_submodule(norm).running_mean -= constant
            else:
                layer.bias.copy_(linear @ layer.bias + constant)
        else:
            layer.weight.copy_(weight @ linear)
            if layer.bias is None:
                model.get_submodule(norm).bias += torch.linalg.solve(linear, constant)
            else:
                layer.bias += weight @ constant


@pytest.mark.parametrize(('batches', 'support'), [(1, None), (3, None), (3, (1, 1))])
@pytest.mark.parametrize('kind', BACKBONES)
def test_backbones_are_fitted_as_defined(kind, batches, support):
    """The layers are those of a conversion, in its order; the weights are those of passes that are written out."""
    make, size = BACKBONES[kind]
    model, plain = built(make), built(make)
    clean, noisy = data(12, 3, size, size), data(12, 3, size, size, seed=1, noisy=True)
    report = apply_denoiserep(copy.deepcopy(plain), 'all', example_input=clean[:1])
    names = [row.name for row in report.layers]
    source = gather(model, [clean])
    assert list(source) == names and len(names) > 8
    with supporting(*support) if support else nullcontext():
        report = fit(model, noisy.chunk(batches), source)
    assert [row.name for row in report.layers] == names and not notes(report)
    expected = copy.deepcopy(plain)
    fit_by_definition(expected, names, clean, noisy, support)
    moved = changed(model, plain)
    assert moved == changed(expected, plain) and len(moved) >= len(names) * (2 if support else 0.5)
    for name in moved:
        assert relative(model.state_dict()[name], expected.state_dict()[name]) < 1e-9, name


@pytest.fixture
def small_ridge(monkeypatch):
    for name in ('match', 'moments'):
        monkeypatch.setattr(import_module(f'mmdenoiserep.core.calibration.{name}'), 'RIDGE', 1e-9)


def test_convolutions_return_the_source_moments(small_ridge):
    """Measured again on the noisy images, with all earlier layers corrected; two means are taken by a BatchNorm."""
    model, plain = built(), built()
    source, before = gather(model, CLEAN), gather(model, NOISY)
    with supporting():
        report = fit(model, WHOLE, source)
    assert notes(report).keys() == {'fc3'}, 'nothing takes its constant'
    after = gather(model, NOISY)
    for name, norm in {'conv1': 'bn1', 'conv2': None, 'conv3': 'bn3'}.items():
        mean = after[name].mean.flatten()
        if norm:
            mean = mean + plain.get_submodule(norm).running_mean - model.get_submodule(norm).running_mean
        expected = source[name].mean.flatten()
        assert relative(mean, expected) < 1e-6 < relative(before[name].mean.flatten(), expected)
        assert relative(after[name].covariance, source[name].covariance) < 1e-6
        assert relative(before[name].covariance, source[name].covariance) > 1e-3


def test_linear_layers_see_the_source_moments(small_ridge):
    """What the old weight multiplies is ``A x + c``, here with a LayerNorm that took a part of c: ``W' = W A``."""
    model, plain = built(), built()
    source = gather(model, CLEAN)
    with supporting():
        fit(model, WHOLE, source)
    assert not torch.equal(model.norm.bias, plain.norm.bias)
    linear = torch.linalg.lstsq(plain.fc1.weight, model.fc1.weight).solution
    after = gather(model, NOISY)['fc1']
    assert relative(after.mean @ linear.mT, source['fc1'].mean) < 1e-6
    assert relative(linear @ after.covariance[0] @ linear.mT, source['fc1'].covariance[0]) < 1e-6


def test_the_bias_of_a_linear_layer_takes_the_constant():
    """``W' x + b' = W (A x + c) + b``: with the mean alone, the bias moves by W times the shift of the mean."""
    model, plain = built(), built()
    source, target = (gather(model, batches)['fc2'] for batches in (CLEAN, NOISY))
    with supporting(covariance=0):
        fit(model, WHOLE, dict(fc2=source))
    assert changed(model, plain) == {'fc2.bias'}
    expected = plain.fc2.bias + plain.fc2.weight @ (source.mean - target.mean)[0]
    assert relative(model.fc2.bias.detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize('support', [None, (1, 1), (0, 1), (1, 0), (0.3, 0.6)])
def test_the_maps_are_in_the_weights(support):
    model, plain = built(), built()
    with supporting(*support) if support else nullcontext():
        report = fit(model, WHOLE, gather(model, CLEAN))
    assert all(row.support == support or not support for row in report.layers)
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
    assert signature(model.state_dict()) == signature(plain.state_dict())
    (x,) = WHOLE
    assert relative(model(x).detach(), with_maps(plain, report, x)) < 1e-9
    assert relative(model(x).detach(), plain(x).detach()) > 1e-3


def test_only_the_named_layers_change():
    model, plain = built(), built()
    with supporting():
        fit(model, WHOLE, gather(model, CLEAN), ['conv1', 'fc2'])
    assert changed(model, plain) == {'conv1.weight', 'bn1.running_mean', 'fc2.weight', 'fc2.bias'}


@pytest.mark.parametrize('batches', [NOISY, WHOLE])
def test_a_pass_ends_with_the_last_layer_that_it_fits(batches):
    """The run on one image alone runs to its end and shows who reads what."""
    model, calls = built(), []
    source = gather(model, CLEAN)
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    fit(model, batches, source, LAYERS[:2])
    assert [calls.count(name) for name in LAYERS] == [1 + len(batches)] * 2 + [1] * 4


def test_the_source_may_be_on_another_device():
    """Moments of a file are on the CPU, those of the target where the model is."""

    class Elsewhere(Moments):
        def to(self, device):
            assert device == torch.device('cpu')
            return self.here

    here, there = built(), built()
    source, away = gather(here, CLEAN), {}
    for name, seen in source.items():
        away[name] = Elsewhere(*seen.mean.shape)
        away[name].here = seen
    fit(here, WHOLE, source)
    fit(there, WHOLE, away)
    assert equal(here.state_dict(), there.state_dict())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize(
    ('shape', 'make'),
    [
        ((8,), lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))),
        (
            PIXELS,
            lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8)),
        ),
        (
            TOKENS,
            lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 3)),
        ),
    ],
    ids=['linear', 'conv', 'norm'],
)
def test_weight_and_bias_move_together_in_every_dtype(shape, make, dtype, batches):
    """In float64, ``.double()`` is no copy: the bias must not move with the new weight."""
    assert gap(make, shape, dtype, batches)[0] < (1e-9 if dtype == torch.float64 else 1e-4)


def squash(layer, args, output):
    return torch.tanh(output)


def gate(layer, args, output):
    return output * torch.sigmoid(output.mean((2, 3), keepdim=True))


class Hooked(nn.Module):
    def __init__(self, hook, bias=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, bias=bias), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        self.conv.register_forward_hook(hook)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize('hook', [squash, gate])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('batches', [1, 2])
def test_a_convolution_with_a_forward_hook(hook, bias, batches):
    difference, report = gap(lambda: Hooked(hook, bias), PIXELS, batches=batches)
    assert difference < 1e-9
    assert notes(report).keys() == (set() if bias else {'conv'}), 'behind the hook, no norm can take the constant'


class Exact(nn.Sequential):
    """Turns autocast off in its forward."""

    def forward(self, x):
        with torch.autocast('cpu', enabled=False):
            return super().forward(x)


def test_autocast_around_a_fit_plays_no_part():
    """The maps are found in the precision of the weights."""
    clean, noisy = (data(40, 8, seed=seed, noisy=seed > 0, dtype=torch.float32) for seed in (0, 1))
    inside, outside = (built(lambda: Exact(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.float32) for _ in 'ab')
    source, before = gather(inside, [clean]), copy.deepcopy(inside)
    fit(outside, [noisy], source)
    with torch.autocast('cpu', torch.bfloat16):
        fit(inside, [noisy], source)
    assert equal(inside.state_dict(), outside.state_dict()) and changed(inside, before)


def test_explicit_maps_leave_nothing_behind():
    model, fitted, x = (*(built(lambda: Hooked(gate)) for _ in range(2)), data(4, *PIXELS))
    report = fit(fitted, [data(16, *PIXELS, seed=2, noisy=True)], gather(fitted, [data(16, *PIXELS, seed=1)]))
    assert not compare_models(model, fitted, x).ok
    with explicit_maps(model, {row.name: (row.linear, row.constant) for row in report.layers}):
        result = compare_models(model, fitted, x)
    assert result.ok and all(difference.tolerance == 1e-9 for difference in result.differences)
    assert not compare_models(model, fitted, x).ok
    assert all('forward' not in layer.__dict__ for layer in model.modules())


class HookedLinear(nn.Module):
    """A scale in a forward pre-hook, as quantisers put it, and a residual in a forward hook, as adapters do."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fc.register_forward_pre_hook(lambda layer, args: (torch.tanh(args[0]) * 2,))
        self.fc.register_forward_hook(lambda layer, args, output: torch.relu(output) + args[0])

    def forward(self, x):
        return self.out(self.fc(self.norm(x)))


@pytest.mark.parametrize('batches', [1, 2])
def test_a_linear_layer_with_hooks(batches):
    assert gap(HookedLinear, TOKENS, batches=batches)[0] < 1e-9


class ByForward(nn.Module):
    """Calls layers by ``.forward``, past their hooks, where images are large: the run of a selection misses that."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        conv, fc = (self.conv.forward, self.fc.forward) if x.shape[-1] > 5 else (self.conv, self.fc)
        return fc(torch.relu(conv(x)).mean((2, 3)))


def test_layers_called_by_forward_are_fitted():
    difference, report = gap(ByForward, PIXELS, example=(8, 5, 5))
    assert difference < 1e-9 and [row.name for row in report.layers] == ['conv', 'fc']


class Masked(nn.Module):
    """Requires a mask besides the images, as the backbones of masked image modelling do; None means none."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mask):
        return self.o(torch.tanh(self.a(x if mask is None else x * mask)))


@pytest.mark.parametrize('chunks', [1, 2])
def test_a_backbone_that_requires_a_mask_is_fitted(chunks):
    model, plain, clean, noisy = built(Masked), built(Masked), data(6, 9, 8), data(6, 9, 8, seed=1, noisy=True)
    report = fit(model, noisy.chunk(chunks), gather(model, [clean]))
    assert [row.name for row in report.layers] == ['a', 'o']
    assert relative(model(noisy, None).detach(), with_maps(plain, report, noisy, None)) < 1e-9
    assert relative(model(noisy, None).detach(), plain(noisy, None).detach()) > 1e-3


class Pyramid(nn.Module):
    """A convolution that all levels share, as heads of detectors do; a last one that runs once."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        levels = [self.stem(x)]
        levels += [levels[0][..., ::2, ::2], levels[0][..., ::4, ::4]]
        return sum(self.last(torch.relu(self.shared(level))).mean() for level in levels)


@pytest.mark.parametrize(
    ('make', 'images'),
    [
        (Recurrent, data(60, 8).abs()),
        (lambda: Recurrent(True), data(60, 8).abs()),
        (Pyramid, data(60, 3, 11, 11).abs()),
        (Loop, data(60, 4, 8).abs()),
        (Net, torch.cat(CLEAN)),
    ],
)
def test_fitted_to_the_images_of_the_source_a_model_stays(make, images):
    """Also where a layer runs several times; in one batch and in several, which do the same."""
    plain, results, before = built(make)(images).detach(), [], built(make).state_dict()
    source = gather(built(make), images.chunk(3), images)
    for batches in ([images], images.chunk(3)):
        clean, noisy = built(make), built(make)
        fit(clean, batches, source)
        assert all((value - before[name]).abs().max() < 1e-12 for name, value in clean.state_dict().items())
        fit(noisy, [batch * 2 + 1 for batch in batches], source)
        results.append(noisy(images).detach())
    assert relative(*results) < 1e-9 and relative(results[0], plain) > 1e-2


@pytest.mark.parametrize(('chunks', 'later'), [(1, 1), (2, 2), (40, 0)])
def test_a_layer_that_runs_again_is_fitted_to_its_first_call(chunks, later):
    """The second one, which a single image does not show, is noted."""
    images = data(40, 8)
    source = gather(built(Second), [images])
    model, once, plain = built(Second), built(Second), built(Second)
    with supporting():
        report = fit(model, (images * 2 + 1).chunk(chunks), source)
        fit(once, (images * 2 + 1).chunk(40), source)
    assert notes(report) == ({'a': f'{later} later calls in these batches were not looked at'} if later else {})
    assert changed(model, plain) == {f'{name}.{kind}' for name in 'abc' for kind in ('weight', 'bias')}
    for name in 'ab':
        assert relative(model.get_submodule(name).weight.detach(), once.get_submodule(name).weight.detach()) < 1e-9


@pytest.mark.parametrize('chunks', [1, 2])
def test_a_layer_that_no_image_reaches_is_skipped(chunks):
    model, plain, x = built(Branch), built(Branch), data(3, 6, 8, seed=7)
    report = fit(model, data(9, 5, 8, noisy=True).chunk(chunks), gather(model, [data(9, 6, 8)]))
    assert [row.name for row in report.layers] == ['a', 'o'] and 'reaches' in report.skipped['b']
    assert changed(model, plain) == {'a.weight', 'a.bias', 'o.weight', 'o.bias'}
    assert relative(model(x).detach(), with_maps(plain, report, x)) < 1e-9


def test_a_layer_that_no_training_image_reached_is_skipped():
    model = built(Branch)
    source = gather(model, [data(9, 5, 8)], data(1, 6, 8))
    assert source['b'].count == 0
    report = fit(model, [data(9, 6, 8, noisy=True)], source)
    assert [row.name for row in report.layers] == ['a', 'o'] and 'training' in report.skipped['b']


def test_an_expert_that_few_vectors_reach_is_skipped():
    """Three vectors span no covariance of eight channels; a fit would amplify what they do not show."""
    model, plain, few = built(Experts), built(Experts), data(80, 1, 8) * 2
    few[:, 0, 0] = -few[:, 0, 0].abs()
    source = gather(model, [torch.cat([few, few + 4, few * 0.1 + 1])])
    few[:2, 0, 0] = few[-1, 0, 0] = 1.0
    report = fit(model, few.chunk(2), source)
    assert [row.name for row in report.layers] == ['experts.0', 'o']
    assert report.skipped.keys() == {'experts.1', 'experts.2'} and '3 vectors' in report.skipped['experts.1']
    assert torch.equal(model.experts[1].weight, plain.experts[1].weight)


def test_an_expert_whose_vectors_belong_to_no_image_is_skipped():
    """In one batch; several batches are halved by batch."""
    model, x = built(Experts), data(80, 1, 8)
    x[1, 0, 0], x[2:, 0, 0] = 1.0, -1.0
    source = gather(model, [torch.cat([x, x + 4])])
    report = fit(model, [2 * x], source)
    assert report.skipped['experts.0'].startswith('its vectors cannot be told apart by image')


def test_a_single_vector_is_no_covariance():
    model = built(lambda: nn.Sequential(nn.Linear(8, 4)))
    many, single = (gather(model, [data(count, 8)]) for count in (50, 1))
    for images, source in ((data(1, 8, seed=1), many), (data(50, 8), single)):
        with pytest.raises(ValueError, match='0: a single vector'):
            fit(model, [images], source)


class Dead(nn.Module):
    """Layers without variance: behind a ReLU that lets nothing through, of a zero weight, beside one that lives."""

    def __init__(self):
        super().__init__()
        self.stem, self.off = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.fc, self.gone, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.off.weight)

    def forward(self, x):
        y = (self.stem(x) + self.off(x)).mean((2, 3))
        return self.out(self.fc(y) + self.gone(torch.relu(-y.square() - 1)))


@pytest.mark.parametrize('chunks', [1, 2])
def test_layers_without_variance_are_left_alone(chunks):
    model, plain = built(Dead, torch.float32), built(Dead, torch.float32)
    clean, noisy = (data(40, 3, 6, 6, seed=seed, dtype=torch.float32) for seed in (0, 1))
    report = fit(model, (noisy * 2 + 1).chunk(chunks), gather(model, [clean]))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert 'fc.bias' in changed(model, plain)
    assert report.skipped.keys() == {'off', 'gone'} and all('variance' in why for why in report.skipped.values())
    assert not any(name.startswith(('off', 'gone')) for name in changed(model, plain))


@pytest.mark.parametrize('size', [1e-15, 1e-22])
def test_a_layer_of_almost_no_variance(size):
    """Variances of 1e-44 are none in float32, whose smallest normal number is 1e-38; those of 1e-30 have a factor."""
    model = built(lambda: nn.Sequential(nn.Linear(8, 4)), torch.float32)
    clean, noisy = (size * data(60, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    source = gather(model, [clean])
    if size < 1e-20:
        with pytest.raises(ValueError, match='0: it has no variance on the training images'):
            fit(model, [noisy * 2], source)
    else:
        (row,) = fit(model, [noisy * 2], source).layers
        assert row.support.covariance > 0.5 and row.linear.isfinite().all() and row.moved > 0.1


@pytest.mark.parametrize(
    ('value', 'dtype'), itertools.product((0.0, 0.3, 255.0), (torch.float32, torch.float64, torch.bfloat16))
)
def test_images_of_one_colour_are_no_domain(value, dtype):
    """Rounding gives constant features a variance of their own, far below what a fit could use."""
    model = built(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))).to(dtype)
    many, constant, before = data(60, 8, dtype=dtype), torch.full((60, 8), value, dtype=dtype), copy.deepcopy(model)
    for images, of in ((constant, many), (many, constant)):
        with pytest.raises(ValueError, match='variance'):
            fit(model, [images], gather(model, [of]))
    assert not changed(model, before)


SOURCE = gather(built(), CLEAN)


def broken(key):
    moments = Moments.of(data(1, 8, 9))
    getattr(moments, key).fill_(torch.nan)
    return moments


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(layers={}), ('no layer',)),
        (dict(source={}), ('conv1', 'source')),
        (dict(source=SOURCE | {'conv1': Moments(1, 3)}), ('conv1', '3', '8')),
        *((dict(source=SOURCE | {'conv1': broken(key)}), ('conv1 in source', 'NaN')) for key in ('mean', 'scatter')),
        *((dict(batches=batches), ('no image',)) for batches in ([], [CLEAN[0][:0]], [CLEAN[0][:0]] * 2, iter([]))),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_sentence(options, words):
    model, plain = built(), built()
    layers = select_layers(model, example_input=CLEAN[0])
    with pytest.raises(ValueError) as error:
        fit_domain(model, **dict(layers=layers, batches=WHOLE, source=SOURCE) | options)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)
    assert not changed(model, plain)


def test_denoisers_are_refused_until_they_are_fused():
    model = built()
    apply_denoiserep(model, 'all', example_input=CLEAN[0])
    with pytest.raises(ValueError, match='fuse_model'):
        fit(model, WHOLE, SOURCE)
    assert len(fit(fuse_model(model), WHOLE, SOURCE).layers) == 6


class Tokens(nn.Module):
    """Takes images as tokens, (B, N, C), and runs a layer on (B, N, C) or on (N, B, C)."""

    def __init__(self, sequence_first):
        super().__init__()
        torch.manual_seed(0)
        self.sequence_first, self.fc = sequence_first, nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)).transpose(0, 1) if self.sequence_first else self.fc(x)


@pytest.mark.parametrize('number', [6, 9], ids=['as many tokens as images', 'more'])
def test_sequence_first_tokens_are_told_apart_by_image(number):
    def tokens(seed):
        return data(6, number, 4, seed=seed) + 3 * data(6, 1, 4, seed=seed + 1)  # images differ more than their tokens

    models = [Tokens(sequence_first).double() for sequence_first in (False, True)]
    reports = [fit(model, [0.5 * tokens(2)], gather(model, [tokens(0)])) for model in models]
    assert 0 < reports[0].layers[0].support.covariance < 1
    assert reports[1].layers[0].support == pytest.approx(reports[0].layers[0].support)
    assert relative(models[1].fc.weight, models[0].fc.weight) < 1e-9


def test_copies_of_an_image_show_no_difference():
    model = built()
    with pytest.raises(CalibrationError, match='all images are alike'):
        fit(model, [NOISY[0][:1].expand(8, -1, -1, -1)], gather(model, CLEAN))

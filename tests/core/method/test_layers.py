"""The denoised layers and their loss."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from helpers import denoised, dense
from mmdenoiserep import DenoiseConv2d, DenoiseLinear, NoiseSchedule
from mmdenoiserep.core import DenoiseLayer, Denoiser
from mmdenoiserep.core.method.layers import convert_layer, restore_layer
from mmdenoiserep.core.method.sample import Sample

LAYERS = {
    'linear': lambda **kw: nn.Linear(8, 6, **kw),
    'linear-without-bias': lambda **kw: nn.Linear(8, 6, bias=False, **kw),
    'conv': lambda **kw: nn.Conv2d(8, 6, 3, **kw),
    'grouped': lambda **kw: nn.Conv2d(8, 6, 3, padding=1, groups=2, **kw),
    'depthwise': lambda **kw: nn.Conv2d(8, 16, 3, groups=8, **kw),
}


def example(layer, dtype=torch.float64, seed=0):
    shape = (2, 5, 8) if isinstance(layer, nn.Linear) else (2, 8, 5, 4)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def tokens(layer, x):
    return x.reshape(-1, 8) if isinstance(layer, nn.Linear) else x.movedim(-3, -1).reshape(-1, 8)


def set_prediction(layer, seed=0):
    """Give a layer the random noise predictor D x + d with entries of order one, and return (D, d)."""
    generator = torch.Generator().manual_seed(seed)
    step, parameters = layer.reverse_step, dict(layer.denoiser.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 2
            parameter.copy_(noise if name == 'down' else noise * step.c1)
        parameters.get('scale', torch.empty(0)).sub_(step.c3_minus_1)
        if 'weight' in parameters:
            parameters['weight'].sub_(step.c3_minus_1 * torch.eye(parameters['weight'].shape[-1]))
    prediction = (dense(layer) + step.c3_minus_1 * torch.eye(8)) / step.c1
    bias = parameters['bias'].detach() / step.c1 if 'bias' in parameters else torch.zeros(8, dtype=prediction.dtype)
    return prediction, bias


def restored(layer):
    layer = copy.deepcopy(layer)
    restore_layer(layer)
    layer.zero_grad()
    return layer


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('rank', [None, 1, 3])
@pytest.mark.parametrize('kind', LAYERS)
def test_starts_as_the_vanilla_layer(kind, rank, dtype):
    vanilla = LAYERS[kind](dtype=dtype)
    layer = copy.deepcopy(vanilla)
    convert_layer(layer, 3, None, rank, None)
    x = example(vanilla, dtype)
    assert type(layer) in (DenoiseLinear, DenoiseConv2d)
    assert all(parameter.dtype == dtype for parameter in layer.denoiser.parameters())
    assert torch.equal(layer(x), vanilla(x))
    assert torch.equal(layer.eval()(x), vanilla(x))


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize(
    'layer, shape',
    [
        *((nn.Linear(8, 6), shape) for shape in ((2, 5, 8), (2, 3, 4, 8), (7, 8), (8,), (0, 8), (2, 0, 8))),
        *(
            (nn.Conv2d(8, 8, 3, groups=groups), shape)
            for groups in (1, 2, 8)
            for shape in ((2, 8, 5, 4), (8, 5, 4), (0, 8, 5, 4))
        ),
    ],
    ids=str,
)
def test_shapes(layer, shape, rank):
    """A Linear layer corrects the last axis, a conv the channels, group by group; the loss averages over all others."""
    layer = denoised(copy.deepcopy(layer).double(), rank)
    x = torch.randn(shape, dtype=torch.float64)
    axis = -1 if isinstance(layer, nn.Linear) else -3
    corrected = x.movedim(axis, -1)
    corrected = (corrected - (corrected @ dense(layer).T + layer.denoiser.bias)).movedim(-1, axis)
    assert torch.allclose(layer.correct(x), corrected, rtol=1e-12, atol=1e-12)
    expected = restored(layer)(corrected)
    for forward in (layer, layer.forward_by_definition):
        assert torch.allclose(forward(x), expected, rtol=1e-12, atol=1e-12)
    check_loss(layer, x)


def check_loss(layer, x):
    """Compare the loss with the formula of its docstring; without tokens it is 0 and has a gradient of 0."""
    loss = layer.denoise_loss(x)
    loss.backward()
    assert loss.shape == ()
    gradients = [parameter.grad for parameter in layer.denoiser.parameters()]
    if x.numel() == 0:
        assert loss.item() == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
        return
    step = layer.reverse_step
    matrix = (dense(layer) + step.c3_minus_1 * torch.eye(8)) / step.c1
    predicted = step.signal * tokens(layer, x) @ matrix.T + layer.denoiser.bias.detach() / step.c1
    residual = torch.eye(8) - step.noise * matrix
    expected = (predicted.square().sum(1).mean() + residual.square().sum()) / 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize('timestep', [1, 300, 999])
@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_loss_is_the_expectation_over_the_noise(kind, rank, timestep):
    """The loss is the mean of |eps - (D x_t + d)|^2 / C over sampled eps, within 4 standard errors of below 1 %."""
    layer = LAYERS[kind](dtype=torch.float64)
    convert_layer(layer, timestep, None, rank, None)
    matrix, bias = set_prediction(layer)
    assert matrix.abs().max() > 0.5
    x, step = example(layer), layer.reverse_step
    noise = torch.randn(2000, *tokens(layer, x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = torch.stack([noise, -noise])  # antithetic pairs
    noised = step.signal * tokens(layer, x) + step.noise * both
    errors = (both - (noised @ matrix.T + bias)).square().mean(dim=(0, -1))
    standard_error = errors.var(dim=0).div(len(noise)).sum().sqrt().item() / errors.shape[1]
    loss = layer.denoise_loss(x).item()
    assert standard_error < 0.01 * loss
    assert abs(errors.mean().item() - loss) < 4 * standard_error


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_loss_ignores_autocast(kind, rank):
    """Under bf16 autocast the layer computes in bf16, but its loss in float32, to the same bits as outside."""
    layer = denoised(LAYERS[kind](), rank)
    x = example(layer, torch.float32)
    outside = layer.denoise_loss(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        inside = layer.denoise_loss(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('rank', [None, 2])
def test_loss_of_half_precision_layers(rank, dtype):
    layer = denoised(nn.Linear(8, 6), rank).to(dtype)
    x = example(layer, dtype)
    loss = layer.denoise_loss(x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(layer.double().denoise_loss(x.double()).item(), rel=1e-4)


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_gradients_are_separate(kind, rank):
    """The label loss trains the layer through its denoiser, the denoising loss the denoiser alone."""
    layer = denoised(LAYERS[kind](dtype=torch.float64), rank)
    x = example(layer).requires_grad_()
    layer(x).square().sum().backward()
    assert all(parameter.grad is None for parameter in layer.denoiser.parameters())
    assert layer.weight.grad.abs().max() > 0
    assert x.grad.abs().max() > 0

    vanilla = restored(layer)
    corrected = layer.correct(x.detach()).requires_grad_()
    vanilla(corrected).square().sum().backward()
    assert torch.allclose(layer.weight.grad, vanilla.weight.grad)
    through = torch.autograd.grad(layer.correct(x), x, corrected.grad)[0]
    assert torch.allclose(x.grad, through)

    layer.zero_grad()
    x.grad = None
    layer.denoise_loss(x).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.denoiser.parameters())
    assert layer.weight.grad is None
    assert x.grad is None


def test_low_rank_start_has_a_gradient():
    """At the start of low rank, `up` gets a gradient; if `down` were zero too, neither would."""
    layer = DenoiseLinear(8, 6, rank=2)
    layer.denoise_loss(example(layer, torch.float32)).backward()
    assert layer.denoiser.up.grad.abs().max() > 0


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', ['linear', 'conv', 'grouped'])
def test_loss_of_a_part_has_the_expectation_of_the_whole(kind, rank):
    """Over many draws the loss and its gradient have the mean of those over all tokens, within 4.5 standard errors."""
    layer = denoised(LAYERS[kind](dtype=torch.float64), rank)
    set_prediction(layer)
    x = example(layer)
    parameters = list(layer.denoiser.parameters())

    def values(loss):
        return torch.cat([loss[None], *(g.flatten() for g in torch.autograd.grad(loss, parameters))])

    whole = values(layer.denoise_loss(x, math.inf))
    draws = [Sample(most=3, seed=seed)(layer, x) for seed in range(4000)]
    assert {draw.shape[2] for draw in draws} == {3 if kind == 'linear' else 4}  # two of each of two images
    parts = torch.stack([values(layer.denoise_loss_of([(draw, 1.0)], math.inf)) for draw in draws])
    error = parts.std(0) / len(parts) ** 0.5
    assert parts[:, 0].std() > 0.05 * whole[0]
    assert ((parts.mean(0) - whole).abs() <= 4.5 * error + 1e-9 * whole.abs()).all()


@pytest.mark.parametrize('rank', [None, 2])
def test_random_state_is_not_touched(rank):
    """Building or converting a layer draws exactly the random numbers of the vanilla layer."""
    for denoise, vanilla, sizes in ((DenoiseLinear, nn.Linear, (8, 6)), (DenoiseConv2d, nn.Conv2d, (8, 6, 3))):
        torch.manual_seed(3)
        plain = vanilla(*sizes)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        layer = denoise(*sizes, rank=rank)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(layer.weight, plain.weight)
        convert_layer(plain, 1, None, rank, None)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    'layer, keys',
    [
        (DenoiseLinear(8, 6), 'bias denoiser.bias denoiser.weight weight'),
        (DenoiseLinear(8, 6, denoiser_bias=False), 'bias denoiser.weight weight'),
        (DenoiseLinear(8, 6, bias=False), 'denoiser.weight weight'),
        (DenoiseLinear(8, 6, rank=2), 'bias denoiser.bias denoiser.down denoiser.scale denoiser.up weight'),
        (DenoiseConv2d(8, 6, 3, padding=1), 'bias denoiser.weight weight'),
        (DenoiseConv2d(8, 6, 3, padding=1, padding_mode='reflect'), 'bias denoiser.bias denoiser.weight weight'),
        (DenoiseConv2d(8, 6, 3, bias=False, groups=2, rank=3), 'denoiser.down denoiser.scale denoiser.up weight'),
    ],
)
def test_names_in_files(layer, keys):
    """The state dict holds the vanilla names and those of the denoiser, nothing else, and no buffer."""
    assert ' '.join(sorted(layer.state_dict())) == keys
    assert not list(layer.buffers())
    assert all(type(parameter) is nn.Parameter for parameter in layer.parameters())


@pytest.mark.parametrize(
    'channels, groups, rank, shapes',
    [
        (8, 1, None, {'weight': (1, 8, 8), 'bias': (8,)}),
        (8, 4, None, {'weight': (4, 2, 2), 'bias': (8,)}),
        (8, 8, None, {'weight': (8, 1, 1), 'bias': (8,)}),
        (8, 2, 3, {'scale': (2,), 'up': (2, 4, 3), 'down': (2, 3, 4), 'bias': (8,)}),
        (8, 2, 4, {'weight': (2, 4, 4), 'bias': (8,)}),
        (8, 8, 2, {'weight': (8, 1, 1), 'bias': (8,)}),
    ],
)
def test_shapes_of_the_parameters(channels, groups, rank, shapes):
    """One block a group; a rank that truncates nothing stores the full block."""
    parameters = dict(Denoiser(channels, groups, rank, bias=True).named_parameters())
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == shapes


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('clone', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(clone, kind, rank):
    """Deep copies and pickles compute the same and share nothing; a state dict makes the round trip."""
    layer = denoised(LAYERS[kind](), rank, timestep=11, schedule=NoiseSchedule(1e-4, 0.02, 50))
    x = example(layer, torch.float32)
    other = clone(layer)
    assert type(other) is type(layer)
    assert other.timestep == 11
    assert other.reverse_step == layer.reverse_step
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.denoise_loss(x), layer.denoise_loss(x))
    fresh = LAYERS[kind]()
    convert_layer(fresh, 11, None, rank, None)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    for parameter in other.parameters():
        parameter.data.zero_()
    assert layer(x).abs().max() > 0


def test_printed_form_shows_the_timestep():
    text = repr(DenoiseLinear(8, 6, timestep=5))
    assert text.startswith('DenoiseLinear(')
    assert 'in_features=8' in text
    assert 'timestep=5' in text


def test_device_and_frozen_layers():
    assert DenoiseLinear(8, 6, rank=2, device='meta').denoiser.down.device.type == 'meta'
    layer = nn.Linear(8, 6).requires_grad_(False)
    convert_layer(layer, 1, None, None, None)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize(
    'build, message',
    [
        (lambda: DenoiseLinear(8, 6, timestep=0), 'timestep must be between 1 and 999, got 0'),
        (lambda: DenoiseLinear(8, 6, timestep=10, schedule=NoiseSchedule(num_timesteps=10)), 'between 1 and 9, got 10'),
        (lambda: DenoiseLinear(8, 6, rank=0), 'rank of a denoiser must be a number from 1'),
        (lambda: DenoiseLinear(8, 6, rank=1.5), 'rank of a denoiser must be'),
        (lambda: DenoiseLinear(8, 6, bias=False, denoiser_bias=True), 'can only be fused into a layer that has a bias'),
        (lambda: DenoiseConv2d(8, 6, 3, padding=1, denoiser_bias=True), 'pads no zeros'),
    ],
)
def test_refused_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_the_smaller_factor_is_multiplied(kind, rank, monkeypatch):
    """A large input leaves the weight to be corrected, a small one is corrected itself; output and gradients agree."""
    layer = denoised(LAYERS[kind](dtype=torch.float64), rank)
    ways = []
    for name in ('_fused', 'correct'):
        method = getattr(DenoiseLayer, name)
        monkeypatch.setattr(DenoiseLayer, name, lambda *args, m=method, n=name: ways.append(n) or m(*args))
    small = example(layer)[:1, ..., :1, :] if isinstance(layer, nn.Linear) else example(layer)[:1, :, :3, :3]
    large = torch.cat([example(layer, seed=seed) for seed in range(20)])
    for x, way in ((small, 'correct'), (large, '_fused')):
        ways.clear()
        x = x.clone().requires_grad_()
        inputs = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
        results = []
        for forward in (layer, layer.forward_by_definition):
            output = forward(x)
            results.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
        expected_way = 'correct' if x.numel() <= layer.weight.numel() else '_fused'
        assert ways == [expected_way, 'correct']
        assert expected_way == way or kind in ('grouped', 'depthwise')
        for actual, expected in zip(*results, strict=True):
            assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)

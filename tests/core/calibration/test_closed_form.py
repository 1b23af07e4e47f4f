"""The closed form of the denoisers' minimum, against searches, and training that ends there."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from mmdenoiserep import DenoiseConv2d, DenoiseLinear, closed_form
from mmdenoiserep.core.method.sample import Sample


def gaussian_features(channels, count=1024, seed=0):
    """Correlated features whose variances span three orders of magnitude, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))
    deviations = torch.logspace(-2, 1, channels, dtype=torch.float64).sqrt()
    noise = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    return noise * deviations @ basis.T + torch.randn(channels, generator=generator, dtype=torch.float64)


def solve(layer, x):
    """Set the denoiser of a layer to the closed form for an input (tokens, C) or (B, C, H, W)."""
    flat = x.reshape(-1, x.shape[1]) if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])
    groups = getattr(layer, 'groups', 1)
    blocks = flat.double().unflatten(1, (groups, -1))
    second_moment = torch.einsum('ngi,ngj->gij', blocks, blocks) / len(blocks)
    rank = layer.denoiser.down.shape[1] if hasattr(layer.denoiser, 'down') else None
    bias = layer.denoiser.bias is not None
    solution = closed_form(blocks.mean(0), second_moment, layer.reverse_step, rank, bias)
    assert all(value.dtype == torch.float64 for value in solution.values())
    layer.denoiser.load_state_dict(solution)


def minimise(layer, x, seed):
    """Minimise the loss with L-BFGS from random values, in units in which it is well-conditioned."""
    set_prediction_like(layer, seed)
    parameters = list(layer.denoiser.parameters())
    units = [1 if name == 'down' else layer.reverse_step.c1 for name, _ in layer.denoiser.named_parameters()]
    free = [(parameter.detach() / unit).requires_grad_() for parameter, unit in zip(parameters, units, strict=True)]
    optimizer = torch.optim.LBFGS(free, max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-13, history_size=50,
                                  line_search_fn='strong_wolfe')  # fmt: skip

    def closure():
        for parameter, value, unit in zip(parameters, free, units, strict=True):
            parameter.data = value.detach() * unit
        loss = layer.denoise_loss(x, math.inf)
        gradients = torch.autograd.grad(loss, parameters)
        for value, gradient, unit in zip(free, gradients, units, strict=True):
            value.grad = gradient * unit
        return loss

    optimizer.step(closure)
    return closure().item()


def set_prediction_like(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.denoiser.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.copy_(noise if name == 'down' else noise * layer.reverse_step.c1)


CASES = {
    'linear': (DenoiseLinear, (8, 4), 300),
    'linear-without-bias': (DenoiseLinear, (8, 4, False), 300),
    'conv-grouped': (DenoiseConv2d, (8, 4, 1, 1, 0, 1, 2), 300),
    'conv-padded': (DenoiseConv2d, (8, 4, 3, 1, 1), 300),
    **{f'step-{t}': (DenoiseLinear, (8, 4), t) for t in (1, 12, 999)},
    **{f'step-{t}-without-bias': (DenoiseLinear, (8, 4, False), t) for t in (1, 12, 999)},
}
"""Kind of the layer, its arguments and timestep."""


def closed_form_case(kind, rank):
    make, arguments, timestep = CASES[kind]
    layer = make(*arguments, timestep=timestep, rank=rank, dtype=torch.float64)
    x = gaussian_features(8, 64)
    return layer, x if isinstance(layer, nn.Linear) else x.reshape(4, 4, 4, 8).movedim(-1, 1)


@pytest.mark.parametrize('rank', [None, 1, 2])
@pytest.mark.parametrize('kind', CASES)
def test_closed_form_is_stationary(kind, rank):
    """The gradient of the loss vanishes in float64 at the closed form, and any random step from it goes up."""
    layer, x = closed_form_case(kind, rank)
    set_prediction_like(layer, 0)
    before = torch.autograd.grad(layer.denoise_loss(x), list(layer.denoiser.parameters()))
    solve(layer, x)
    best = layer.denoise_loss(x)
    after = torch.autograd.grad(best, list(layer.denoiser.parameters()))
    for gradient, start in zip(after, before, strict=True):
        assert gradient.abs().max() < 1e-9 * start.abs().max()
    solution = copy.deepcopy(layer.denoiser.state_dict())
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for name, parameter in layer.denoiser.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = solution[name] + size * solution[name].abs().mean() * noise
        assert layer.denoise_loss(x) > best


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('kind', CASES)
def test_closed_form_is_the_minimum(kind, rank):
    """L-BFGS finds the same minimum from one of its starts, and nothing below it."""
    layer, x = closed_form_case(kind, rank)
    solve(layer, x)
    best = layer.denoise_loss(x).item()
    found = [minimise(layer, x, seed) for seed in range(1 if rank is None else 3)]
    assert min(found) >= best * (1 - 1e-10)
    assert min(found) <= best * (1 + 1e-4)


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_low_rank_keeps_the_best_directions(rank):
    """The directions that the closed form keeps are the best of all choices, among them both ends of the spectrum."""
    layer = DenoiseLinear(8, 4, timestep=300, rank=rank, dtype=torch.float64)
    x = gaussian_features(8)
    solve(layer, x)
    step = layer.reverse_step
    variances = step.signal**2 * torch.linalg.eigvalsh(x.T.cov(correction=0)) + step.noise**2

    def cost(kept):
        rest = torch.tensor([variance for place, variance in enumerate(variances) if place not in kept])
        scale = step.noise / rest.mean()
        return (
            (rest * (scale - step.noise / rest) ** 2).sum().item() / 8 + 1 - (step.noise**2 / variances).mean().item()
        )

    costs = {kept: cost(kept) for kept in itertools.combinations(range(8), rank)}
    assert layer.denoise_loss(x).item() == pytest.approx(min(costs.values()), rel=1e-9)
    assert max(costs.values()) > 1.01 * min(costs.values())


@pytest.mark.parametrize(('timestep', 'most'), [(12, None), (500, None), (999, None), (500, 32)])
@pytest.mark.parametrize('rank', [None, 4])
def test_training_reaches_the_closed_form(rank, timestep, most):
    """Adam, on all tokens or on 32 of 1,024 at a time, comes within 1 % of the optimum from a start that is farther."""
    x, steps = gaussian_features(16), 2000 if most else 1000
    exact = DenoiseLinear(16, 4, timestep=timestep, rank=rank, dtype=torch.float64)
    solve(exact, x)
    best = exact.denoise_loss(x).item()

    layer, x = DenoiseLinear(16, 4, timestep=timestep, rank=rank), x.float()
    assert layer.denoise_loss(x).item() > (1.1 if most else 1.01) * best
    optimizer = torch.optim.Adam(layer.denoiser.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for iteration in range(steps):
        optimizer.zero_grad()
        part = Sample(most=most, seed=iteration)(layer, x) if most else None
        loss = layer.denoise_loss_of([(part, 1.0)]) if most else layer.denoise_loss(x)
        loss.backward()
        optimizer.step()
        schedule.step()
    assert layer.denoise_loss(x).item() < 1.01 * best

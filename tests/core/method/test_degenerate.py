"""Features that no fit can be made of: without variance, not finite, of a layer narrower than the rank."""

import copy
import itertools

import pytest
import torch
from torch import nn

from helpers import relative
from mmdenoiserep.core import Moments, apply_denoiserep, calibrate, collect_moments, fuse_model, transport

FITS = ('full', 'covariance', 'diagonal', 'mean')


def data(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def converted(model, example):
    model = copy.deepcopy(model)
    apply_denoiserep(model, 'all', example_input=example)
    return model


def finite(model):
    return all(value.isfinite().all() for value in model.state_dict().values())


DEAD = Moments.of(torch.full((2, 3, 50), 0.7, dtype=torch.float64))
ALIVE = Moments.of(data(2, 3, 50, dtype=torch.float64))
ZERO = Moments.of(torch.zeros(2, 3, 50, dtype=torch.float64))
HALF = Moments.of(data(2, 3, 50, dtype=torch.float64) * torch.tensor([1.0, 0, 1])[:, None])


@pytest.mark.parametrize('fit', FITS)
def test_a_map_between_dead_channels_is_finite(fit):
    for source, target in itertools.product((DEAD, ALIVE, ZERO, HALF), repeat=2):
        linear, constant = transport(source, target, fit)
        assert linear.isfinite().all() and constant.isfinite().all()
        if source is target:
            identity = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
            assert relative(linear, identity) < 1e-9 and constant.abs().max() < 1e-9


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


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('chunks', [1, 2])
def test_layers_without_variance_are_left_alone(fit, chunks):
    torch.manual_seed(0)
    plain = Dead()
    model = converted(plain, data(1, 3, 6, 6))
    source = collect_moments(model, [data(40, 3, 6, 6)])
    report = calibrate(model, list((data(40, 3, 6, 6, seed=1) * 2 + 1).chunk(chunks)), 'domain', source, fit=fit)
    fused = fuse_model(model)
    assert finite(fused) and not torch.equal(fused.fc.bias, plain.fc.bias)
    if fit != 'mean':  # which needs no variance
        assert report.skipped.keys() == {'off', 'gone'} and all('variance' in why for why in report.skipped.values())
        assert torch.equal(fused.gone.weight, plain.gone.weight) and torch.equal(fused.off.bias, plain.off.bias)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('value', [0.0, 0.3, 255.0])
def test_images_of_one_colour_are_no_domain(dtype, value):
    """Rounding gives constant features a variance of their own, far below what a fit could use."""
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype), data(1, 8, dtype=dtype))
    source, before = collect_moments(model, [data(60, 8, dtype=dtype)]), copy.deepcopy(model.state_dict())
    constant = torch.full((60, 8), value, dtype=dtype)
    for fit in ('full', 'covariance', 'diagonal'):
        with pytest.raises(ValueError, match='variance'):
            calibrate(model, [constant], 'domain', source, fit=fit)
        with pytest.raises(ValueError, match='variance'):
            calibrate(model, [data(60, 8, dtype=dtype)], 'domain', collect_moments(model, [constant]), fit=fit)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 3e38])
@pytest.mark.parametrize('chunks', [1, 2])
def test_features_that_are_not_finite_are_refused_by_name(bad, chunks):
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), data(1, 8))
    source, images = collect_moments(model, [data(60, 8)]), data(60, 8)
    images[3, 2] = bad
    with pytest.raises(ValueError, match='0'):
        collect_moments(model, list(images.chunk(chunks)))
    with pytest.raises(ValueError, match='0'):
        calibrate(model, list(images.chunk(chunks)), 'domain', source)
    with pytest.raises(ValueError, match='0'):
        calibrate(model, list(images.chunk(chunks)))
    assert finite(model)


@pytest.mark.parametrize('key', ['mean', 'scatter'])
def test_a_source_that_is_not_finite_is_refused_by_name(key):
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), data(1, 8))
    source = collect_moments(model, [data(60, 8)])
    getattr(source['1'], key).fill_(torch.nan)
    with pytest.raises(ValueError, match='1 in source'):
        calibrate(model, [data(60, 8)], 'domain', source)


def test_the_report_gives_a_rank_to_maps_of_low_rank_only():
    model = converted(nn.Sequential(nn.Linear(8, 80), nn.ReLU(), nn.Linear(80, 64), nn.Linear(64, 4)), data(1, 8))
    source = collect_moments(model, [data(400, 8)])
    report = calibrate(model, [data(400, 8, seed=1) + 1], 'domain', source, rank=64)
    assert [row.rank for row in report.layers] == [None, 64, None]
    ranks = [line.split()[2] for line in str(report).splitlines()[2:5]]
    assert ranks == ['-', '64', '-']
    assert torch.linalg.matrix_rank(report.layers[1].linear[0] - torch.eye(80), atol=1e-6) == 64


@pytest.mark.parametrize('rank', [0, -3])
def test_a_rank_below_one_is_refused(rank):
    """``[..., -0:]`` is everything."""
    model = converted(nn.Sequential(nn.Linear(8, 8)), data(1, 8))
    source = collect_moments(model, [data(60, 8)])
    with pytest.raises(ValueError, match='rank'):
        calibrate(model, [data(60, 8)], 'domain', source, rank=rank)
    with pytest.raises(ValueError, match='rank'):
        transport(ALIVE, HALF, rank=rank)

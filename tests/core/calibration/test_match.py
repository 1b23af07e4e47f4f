"""The map that carries the moments of features to others, and how much of it images support."""

import itertools
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from calibration_helpers import clusters, data, vectors
from helpers import relative
from mmdenoiserep.core import Moments, Support, transport
from mmdenoiserep.core.calibration.features import Features
from mmdenoiserep.core.calibration.halves import ImageVectors
from mmdenoiserep.core.calibration.match import find_support

IDENTITY = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)


@pytest.fixture
def no_ridge(monkeypatch):
    for name in ('match', 'moments'):
        monkeypatch.setattr(import_module(f'mmdenoiserep.core.calibration.{name}'), 'RIDGE', 0.0)


def gaussian(covariance, mean, seed):
    root = torch.linalg.cholesky(covariance)
    return (root @ data(len(mean), 200_000, seed=seed) + mean[:, None])[None]


def test_gaussian_features_with_known_noise_get_their_clean_moments_back():
    mixing, mean = data(5, 5), data(5, seed=1)
    covariance = mixing @ mixing.T + torch.eye(5)
    source = Moments.of(gaussian(covariance, mean, 2))
    noisy = gaussian(covariance + 0.8 * torch.eye(5), mean + 0.5, 3)
    linear, constant = transport(source, Moments.of(noisy))
    back = Moments.of(linear @ noisy + constant[..., None])
    assert relative(back.mean, mean[None]) < 0.02
    assert relative(back.covariance, covariance[None]) < 0.03
    assert relative(Moments.of(noisy).covariance, covariance[None]) > 0.05
    assert relative(linear, linear.mT) < 0.03, 'for noise in all directions, the map shrinks along the eigenvectors'


@pytest.mark.parametrize('support', [Support(), Support(mean=0.3), Support(0.4, 0.0), Support(0.0, 0.7), Support(0, 0)])
def test_without_a_ridge_the_supported_share_is_corrected(support, no_ridge):
    """The mean moves by its share; features of the covariance ``S_s + p (S_t - S_s)`` get that of the source."""
    x = vectors(size=4, seed=1)
    source, target = Moments.of(vectors(size=4)), Moments.of(x)
    linear, constant = transport(source, target, support)
    back = Moments.of(linear @ x + constant[..., None])
    assert relative(back.mean, target.mean + support.mean * (source.mean - target.mean)) < 1e-9
    if support.covariance:
        part = source.covariance + support.covariance * (target.covariance - source.covariance)
        assert relative(linear @ part @ linear.mT, source.covariance) < 1e-9
        assert relative(part, source.covariance) > 1e-2
    else:
        assert torch.equal(linear, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    if not any(support):
        assert not constant.any()


def test_equal_moments_need_no_map():
    moments = Moments.of(vectors())
    linear, constant = transport(moments, moments)
    assert relative(linear, IDENTITY) < 1e-9 and constant.abs().max() < 1e-9


DEAD = Moments.of(torch.full((2, 3, 50), 0.7, dtype=torch.float64))
ALIVE = Moments.of(data(2, 3, 50))
ZERO = Moments.of(torch.zeros(2, 3, 50, dtype=torch.float64))
HALF = Moments.of(data(2, 3, 50) * torch.tensor([1.0, 0, 1])[:, None])


def test_a_map_between_dead_channels_is_finite():
    for source, target in itertools.product((DEAD, ALIVE, ZERO, HALF), repeat=2):
        linear, constant = transport(source, target)
        assert linear.isfinite().all() and constant.isfinite().all()
        if source is target:
            assert relative(linear, IDENTITY) < 1e-9 and constant.abs().max() < 1e-9


@pytest.mark.parametrize(('target', 'word'), [(Moments(1, 3), 'differ'), (Moments(2, 3), 'no image')])
def test_maps_that_do_not_exist_are_refused(target, word):
    with pytest.raises(ValueError, match=word):
        transport(ALIVE, target)


# How much the images support


def by_definition(source, first, second):
    """Returns the support by its equations, in numpy, from vectors, (groups, size, n) each."""
    shares, both = [], np.concatenate([first, second], 2)
    covariance, mean = (
        (lambda x: np.stack([np.atleast_2d(np.cov(group, bias=True)) for group in x])),
        (lambda x: x.mean(2)),
    )
    spread = covariance(source)
    ridge = 0.01 * np.mean([group.diagonal() for group in spread])
    precision = np.linalg.inv(spread + ridge * np.eye(source.shape[1]))
    (a, b, t, s) = (x.shape[2] for x in (first, second, both, source))
    for moment in (covariance, mean):
        squares = []
        for x, y in ((first, second), (both, source)):
            total = 0.0
            for p, d in zip(precision, moment(x) - moment(y), strict=True):
                total += np.trace(p @ d @ p @ d) if d.ndim == 2 else d @ p @ d
            squares.append(total)
        shares.append(1 - min(1, (1 + t / s) * a * b / t**2 * squares[0] / squares[1]))
    return shares


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize(('groups', 'size'), [(1, 6), (3, 4), (8, 1)])
def test_the_support_is_that_of_its_equations(groups, size, dtype, tolerance):
    """Of halves of different sizes, and of channels whose variances differ."""
    scale = torch.linspace(0.2, 3, size, dtype=torch.float64)[:, None]
    source, first, second = (scale * (data(groups, size, size) @ data(groups, size, n, seed=n)) for n in (300, 40, 70))
    first, second = first * 1.2 + scale, second * 1.7 + 0.6 * scale
    expected = by_definition(*(x.numpy() for x in (source, first, second)))
    source, *halves = (Moments.of(x) for x in (source, first, second))
    support = find_support(source, tuple(halves), source.factor(dtype))
    assert list(support) == pytest.approx(expected, abs=tolerance)
    assert all(0.05 < share < 0.95 for share in support), 'neither nothing nor everything'


def support_of(source, images):
    """Returns the support of images, (images, n, C), against those of the training domain."""
    seen = ImageVectors(Features(nn.Linear(source.shape[-1], 2)))
    seen.add(images.flatten(0, 1).mT[None], len(images))
    source = Moments.of(source.flatten(0, 1).mT[None])
    return find_support(source, seen.halves(source.factor()), source.factor())


SEEDS = range(6)


@pytest.mark.parametrize('images', [20, 400])
def test_other_images_of_one_domain_support_almost_nothing(images):
    """The difference is by chance, as that of the halves; the threshold of one seed is that of 136 numbers."""
    supports = []
    for seed in SEEDS:
        mixing = data(16, 16, seed=seed)
        source, target = (data(n, 8, 16, seed=9 + n + seed) @ mixing for n in (1000, images))
        supports.append(support_of(source, target))
    assert all(support.mean < 0.05 for support in supports)
    assert sum(support.covariance for support in supports) / len(SEEDS) < 0.1
    assert max(support.covariance for support in supports) < 0.4


def test_a_shift_beyond_the_difference_of_the_content_is_supported():
    for seed in SEEDS:
        source, target = clusters([0.5, 0.5], 600, seed), clusters([0.5, 0.5], 400, seed, draw=1)
        assert min(support_of(source, 3 * target + 20)) > 0.9


def test_another_mix_of_classes_supports_nothing_but_noise_does():
    """Which leaves the mean, for the mix of classes moves it by as much as noise could."""
    for seed in SEEDS:
        source, target = clusters([0.5, 0.5], 1000, seed), clusters([0.6, 0.4], 400, seed, draw=1)
        assert support_of(source, target) == (0.0, 0.0)
        noisy = support_of(source, target + 1.5 * data(*target.shape, seed=99 + seed))
        assert noisy.covariance > 0.5 and noisy.mean == 0


def test_classes_that_are_missing_are_a_limit():
    """The halves show what the images show: without the second class, its spread looks like one of the domain."""
    for seed in SEEDS:
        source, target = clusters([0.5, 0.5], 1000, seed), clusters([1.0, 0.0], 400, seed, draw=1)
        support = support_of(source, target)
        assert support.covariance > 0.8 and support.mean < 0.6


def test_no_difference_at_all_supports_nothing():
    moments = Moments.of(vectors())
    assert find_support(moments, (moments, moments), moments.factor()) == (0.0, 0.0)


def test_half_the_strength_is_half_of_the_way():
    source, target = (Moments.of(data(2, 3, 40, seed=seed)) for seed in (0, 1))
    support = Support(0.7, 0.4)
    whole, half, none = (transport(source, target, support, strength=strength) for strength in (1.0, 0.5, 0.0))
    x = data(2, 3, 5, seed=2)
    moved, middle, same = (linear @ x + constant[..., None] for linear, constant in (whole, half, none))
    assert relative(middle, (x + moved) / 2) < 1e-12 and relative(same, x) < 1e-12 < relative(moved, x)

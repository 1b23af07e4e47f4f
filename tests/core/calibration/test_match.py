"""The map that carries the moments of features to others."""

import itertools
from importlib import import_module

import pytest
import torch

from calibration_helpers import data, vectors
from helpers import relative
from mmdenoiserep.core import Moments, transport
from mmdenoiserep.core.calibration.match import FITS

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


@pytest.mark.parametrize('fit', FITS)
def test_without_a_ridge_a_fit_matches_what_it_says(fit, no_ridge):
    """The mean of the source or, fitting the covariance, of the target; covariances, variances or neither."""
    x = vectors(size=4, seed=1)
    source, target = Moments.of(vectors(size=4)), Moments.of(x)
    linear, constant = transport(source, target, fit)
    back = Moments.of(linear @ x + constant[..., None])
    assert relative(back.mean, (target if fit == 'covariance' else source).mean) < 1e-9
    if fit in ('full', 'covariance'):
        assert relative(back.covariance, source.covariance) < 1e-9
        return
    diagonal = linear.diagonal(dim1=1, dim2=2)
    assert torch.equal(linear, torch.diag_embed(diagonal))
    if fit == 'diagonal':
        assert relative(*(m.covariance.diagonal(dim1=1, dim2=2) for m in (back, source))) < 1e-9
    else:
        assert (diagonal == 1).all()


@pytest.mark.parametrize('fit', FITS)
def test_equal_moments_need_no_map(fit):
    moments = Moments.of(vectors())
    linear, constant = transport(moments, moments, fit)
    assert relative(linear, IDENTITY) < 1e-9 and constant.abs().max() < 1e-9


def test_a_prior_shrinks_the_map_to_nothing():
    source, target = (Moments.of(vectors(seed=seed)) for seed in (0, 1))
    sizes = [(transport(source, target, prior=p)[0] - torch.eye(3)).norm().item() for p in (0.0, 0.5, 1.0)]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 1e-9


DEAD = Moments.of(torch.full((2, 3, 50), 0.7, dtype=torch.float64))
ALIVE = Moments.of(data(2, 3, 50))
ZERO = Moments.of(torch.zeros(2, 3, 50, dtype=torch.float64))
HALF = Moments.of(data(2, 3, 50) * torch.tensor([1.0, 0, 1])[:, None])


@pytest.mark.parametrize('fit', FITS)
def test_a_map_between_dead_channels_is_finite(fit):
    for source, target in itertools.product((DEAD, ALIVE, ZERO, HALF), repeat=2):
        linear, constant = transport(source, target, fit)
        assert linear.isfinite().all() and constant.isfinite().all()
        if source is target:
            assert relative(linear, IDENTITY) < 1e-9 and constant.abs().max() < 1e-9


@pytest.mark.parametrize(
    ('changes', 'word'),
    [
        (dict(fit='half'), 'half'),
        (dict(target=Moments(1, 3)), 'differ'),
        (dict(target=Moments(2, 3)), 'no image'),
    ],
)
def test_maps_that_do_not_exist_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        transport(**{**dict(source=ALIVE, target=HALF, fit='full'), **changes})

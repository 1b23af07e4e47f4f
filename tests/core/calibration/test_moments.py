"""Moments gathered in pieces, in any precision, and what a file holds of them."""

import pytest
import torch

from calibration_helpers import data, vectors
from helpers import relative
from mmdenoiserep.core import Moments


def exact(x):
    return x.mean(-1), torch.stack([torch.cov(group, correction=0) for group in x.double()])


def test_moments_of_pieces_are_those_of_the_whole():
    x = vectors()
    whole, merged = Moments.of(x), Moments(2, 3)
    for piece in x.split([1, 99, 0, 400], -1):
        merged.update(piece)
    halves = Moments.of(x[..., :123])
    halves.merge(Moments.of(x[..., 123:]))
    mean, covariance = exact(x)
    for moments in (whole, merged, halves):
        assert moments.count == 500
        assert relative(moments.mean, mean) < 1e-13 and relative(moments.covariance, covariance) < 1e-13
        assert relative(moments.second_moment, x @ x.mT / 500) < 1e-13


def test_a_large_mean_costs_no_precision():
    """In float64 the naive E[x^2] - E[x]^2 would lose all digits here."""
    x = vectors() + 1e8
    merged = Moments(2, 3)
    for piece in x.split(50, -1):
        merged.update(piece)
    assert relative(merged.covariance, exact(x - 1e8)[1]) < 1e-6


def test_float32_and_half_precision_are_summed_in_float64():
    x = vectors().float() + 100
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert relative(moments.covariance, exact(x)[1]) < 1e-5
    half = x.to(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative(Moments.of(half).covariance, exact(half)[1]) < 1e-5


def test_a_root_holds_the_covariance():
    """With the ridge of 1 % of the mean variance; vectors that come later make it another root."""
    moments = Moments.of(vectors())
    root, covariance = moments.root(), exact(vectors())[1]
    mean_variance = covariance.diagonal(dim1=1, dim2=2).mean()
    assert relative(root @ root, covariance + 0.01 * mean_variance * torch.eye(3, dtype=torch.float64)) < 1e-12
    assert relative(root, root.mT) < 1e-12
    back = Moments.from_root(moments.count, moments.mean, root)
    assert back.count == 500 and torch.equal(back.mean, moments.mean) and back.root() is root
    assert relative(back.covariance, covariance) < 1e-12
    assert relative(back.to('cpu').root(), root) == 0 and back.root(torch.float32).dtype == torch.float32
    back.update(vectors(seed=1))
    both = Moments.of(torch.cat([vectors(), vectors(seed=1)], -1))
    assert relative(back.root(), both.root()) < 1e-12 and relative(both.root(), root) > 1e-2


@pytest.mark.parametrize('bias', [None, data(5, seed=1)])
def test_moments_of_a_linear_map(bias):
    """They follow from those of its input."""
    x, weight = vectors(1), data(5, 3)
    y = weight @ x if bias is None else weight @ x + bias[:, None]
    mapped, expected = Moments.of(x).mapped(weight, bias), Moments.of(y)
    assert mapped.count == 500
    assert relative(mapped.mean, expected.mean) < 1e-12 and relative(mapped.covariance, expected.covariance) < 1e-12


def test_moments_move_to_another_device():
    moments = Moments.of(vectors())
    moved = moments.to('meta')
    assert moved.mean.is_meta and moved.scatter.is_meta and moved.count == moments.count

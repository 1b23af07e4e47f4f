"""Moments gathered in pieces, in any precision, and what a file holds of them."""

import pytest
import torch

from calibration_helpers import vectors
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


def test_moments_come_back_from_a_file(tmp_path):
    moments = Moments.of(vectors())
    torch.save(moments.state_dict(), tmp_path / 'moments.pth')
    back = Moments.from_state_dict(torch.load(tmp_path / 'moments.pth', weights_only=True))
    assert back.count == moments.count
    assert torch.equal(back.mean, moments.mean) and torch.equal(back.scatter, moments.scatter)
    back.update(vectors())
    assert back.count == 1000 and moments.count == 500


@pytest.mark.parametrize('change', [dict(mean=torch.zeros(2, 4)), dict(scatter=torch.full((2, 3, 3), torch.nan))])
def test_damaged_moments_are_refused(change):
    with pytest.raises(ValueError):
        Moments.from_state_dict({**Moments.of(vectors()).state_dict(), **change})


def test_moments_move_to_another_device():
    moments = Moments.of(vectors())
    moved = moments.to('meta')
    assert moved.mean.is_meta and moved.scatter.is_meta and moved.count == moments.count

"""The noise schedule."""

import mpmath
import pytest
import torch

from mmdenoiserep import NoiseSchedule

mpmath.mp.dps = 60


def exact_step(timestep, start='1e-4', end='2e-3', steps=1000):
    """Work out (signal, noise, c1, c3 - 1) with 60 digits."""
    start, end = mpmath.mpf(start), mpmath.mpf(end)
    betas = [start + (end - start) * i / (steps - 1) for i in range(timestep + 1)]
    abar = mpmath.fprod(1 - beta for beta in betas)
    noise = mpmath.sqrt(1 - abar)
    root = mpmath.sqrt(1 - betas[timestep])
    return mpmath.sqrt(abar), noise, betas[timestep] / (root * noise), 1 / root - 1


def test_official_constants():
    """The defaults are the official schedule: linear from 1e-4 to 2e-3 in 1000 steps, in float64."""
    schedule = NoiseSchedule()
    assert len(schedule) == len(schedule.betas) == len(schedule.alphas) == len(schedule.alphas_cumprod) == 1000
    assert schedule.betas.dtype == schedule.alphas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.betas[0].item() == 1e-4
    assert schedule.betas[-1].item() == 2e-3
    assert torch.allclose(schedule.betas.diff(), torch.full((999,), 1.9e-3 / 999, dtype=torch.float64), atol=0)
    assert torch.equal(schedule.alphas, 1 - schedule.betas)
    assert schedule.alphas_cumprod[2] == pytest.approx(schedule.alphas[:3].prod().item(), rel=1e-15)


@pytest.mark.parametrize('timestep', [1, 2, 12, 100, 500, 999])
def test_reverse_step_has_all_digits(timestep):
    """1 - abar and c3 - 1 keep 12 digits, which float32 and the plain formulas do not; t is the index itself."""
    step = NoiseSchedule().reverse_step(timestep)
    assert all(type(value) is float for value in step)
    assert list(step) == pytest.approx([float(value) for value in exact_step(timestep)], rel=1e-12, abs=0)


def test_arrays_agree_with_the_step():
    schedule = NoiseSchedule()
    step = schedule.reverse_step(40)
    assert step.signal**2 == pytest.approx(schedule.alphas_cumprod[40].item(), rel=1e-13)
    assert 1 + step.c3_minus_1 == pytest.approx(schedule.alphas[40].item() ** -0.5, rel=1e-14)


def test_other_constants():
    schedule = NoiseSchedule(0.01, 0.3, 10)
    assert len(schedule) == 10
    exact = exact_step(9, '0.01', '0.3', 10)
    assert list(schedule.reverse_step(9)) == pytest.approx([float(value) for value in exact], rel=1e-12, abs=0)


@pytest.mark.parametrize('betas', [(0, 0.1), (-0.1, 0.1), (0.2, 0.1), (0.1, 1), (float('nan'), 0.1)])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match='beta_start <= beta_end'):
        NoiseSchedule(*betas)


def test_too_few_timesteps():
    with pytest.raises(ValueError, match='at least 2, got 1'):
        NoiseSchedule(num_timesteps=1)


@pytest.mark.parametrize('timestep', [-1, 0, 1000])
def test_timestep_outside(timestep):
    """Index 0 stays unused, and there is no wrapping round."""
    with pytest.raises(ValueError, match=f'between 1 and 999, got {timestep}'):
        NoiseSchedule().reverse_step(timestep)

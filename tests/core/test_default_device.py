"""Where tensors are made on another device by default, a model of the CPU stays there."""

import copy

import pytest
import torch
from torch import nn

from calibration_helpers import built, data, fit, gather
from helpers import relative
from mmdenoiserep.core import (
    apply_denoiserep,
    denoise_losses,
    fuse_checkpoint,
    load_moments,
    save_moments,
    solve_denoisers,
    verify_fusion,
)


@pytest.mark.parametrize('rank', [None, 2])
def test_the_default_device_of_the_program_plays_no_part(rank, tmp_path):
    """Here a device without memory."""

    def make():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    model, vanilla, x = built(make), built(make), data(16, 6, 8)
    noisy = [1.5 * x + 0.5]
    expected = gather(model, [x], stride=2)
    with torch.device('meta'):
        gathered = gather(model, [x], stride=2)
        save_moments(gathered, tmp_path / 'moments.pth', {})
        source, _ = load_moments(tmp_path / 'moments.pth')
        assert len(fit(copy.deepcopy(model), noisy, source, stride=2).layers) == 2
        apply_denoiserep(model, 'all', rank=rank, example_input=x[:1])
        with denoise_losses(model, tokens=5) as losses:
            model(x)
            assert losses.mean().item() > 0
        solve_denoisers(model, noisy)
        assert verify_fusion(model, example_input=x).ok
        torch.save(model.state_dict(), tmp_path / 'in.pth')
        fuse_checkpoint(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert all(torch.equal(seen.mean, expected[name].mean) for name, seen in gathered.items())
    vanilla.load_state_dict(torch.load(tmp_path / 'out.pth')['state_dict'])
    assert relative(vanilla(x), model(x)) < 1e-9

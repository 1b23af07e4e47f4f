"""The core on a device, in every dtype: layers, fusion, verification, losses, calibration and the domain fit."""

import copy

import pytest
import torch
from torch import nn

from calibration_helpers import CLEAN, LAYERS, NOISY, built, fit, gather
from helpers import randomise, relative
from mmdenoiserep import apply_denoiserep, denoise_losses, fuse_model, verify_fusion
from mmdenoiserep.core import load_moments, save_moments, solve_denoisers
from mmdenoiserep.core.fusing.verify import TOLERANCES

pytestmark = pytest.mark.gpu
HALF = torch.float16, torch.bfloat16


def denoised(device, dtype=torch.float64):
    """Returns a denoised model with random denoisers and statistics, and images that matter to it."""
    model, images = built(), CLEAN[0]
    apply_denoiserep(model, 'all', rank=4, example_input=images)
    return randomise(model).to(device, dtype).eval(), images.to(device, dtype)


@pytest.mark.parametrize('dtype', TOLERANCES)
@torch.no_grad()
def test_the_fused_model_is_the_denoised_one(dtype, device):
    model, images = denoised(device, dtype)
    fused = fuse_model(model)
    difference = relative(fused(images), model(images))
    assert {p.device.type for p in fused.parameters()} == {device.type}
    assert difference < TOLERANCES[dtype] and verify_fusion(model, fused, images).ok
    without = copy.deepcopy(model)
    for key, parameter in without.named_parameters():
        if '.denoiser.' in key:
            parameter.zero_()
    assert relative(without(images), model(images)) > max(10 * difference, 0.05), 'the denoisers matter'
    assert not verify_fusion(model, without, images, tolerance=10 * difference + 1e-9).ok


@pytest.mark.parametrize('dtype', HALF)
@torch.no_grad()
def test_autocast(dtype, device):
    """Weights in float32, products in half precision: against the same model in float64."""
    model, images = denoised(device)
    expected = model(images)
    model, images = model.float(), images.float()
    with torch.autocast(device.type, dtype):
        for one in (model, fuse_model(model)):
            assert relative(one(images), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('dtype', HALF)
def test_the_loss_under_autocast_with_loss_scaling(dtype, checkpointing, device):
    """Gradients of the denoisers, unscaled, are those of float64."""

    class Block(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            if checkpointing:
                return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)
            return self.net(x)

    def gradients(model, images, scaler=None):
        with denoise_losses(model, tokens=None) as losses:
            with torch.autocast(device.type, dtype, enabled=scaler is not None):
                model(images)
                loss = losses.mean()
            (scaler.scale(loss) if scaler else loss).backward()
        scale = scaler.get_scale() if scaler else 1
        return loss.item(), {k: p.grad / scale for k, p in model.named_parameters() if '.denoiser.' in k}

    model, images = denoised(device)
    loss, expected = gradients(Block(model), images)
    model = Block(copy.deepcopy(model).float())
    model.zero_grad()
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    half_loss, actual = gradients(model, images.float(), scaler)
    assert half_loss == pytest.approx(loss, rel=TOLERANCES[dtype]) and expected.keys() == actual.keys()
    for key, value in expected.items():
        assert (actual[key] - value).norm() < TOLERANCES[dtype] * value.norm(), key
        assert value.norm() > 0, key


@pytest.mark.usefixtures('full_precision')
def test_the_closed_form_is_that_of_the_cpu(device):
    solved = []
    for place in (torch.device('cpu'), device):
        model, _ = denoised(place)
        solve_denoisers(model, [images.to(place) for images in CLEAN])
        solved.append(model.cpu().state_dict())
    for key, value in solved[0].items():
        torch.testing.assert_close(solved[1][key], value, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(value, solved[0][key]) for key, value in denoised('cpu')[0].state_dict().items())


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.usefixtures('full_precision')
def test_a_domain_fit_with_moments_from_a_file_is_that_of_the_cpu(dtype, tolerance, device, tmp_path):
    """The moments are gathered on the device, and read from their file on both sides."""
    model = built().to(device, dtype)
    clean, noisy = ([images.to(device, dtype) for images in batches] for batches in (CLEAN, NOISY))
    save_moments(gather(model, clean), tmp_path / 'moments.pth', {})
    source, _ = load_moments(tmp_path / 'moments.pth')
    assert {seen.mean.device.type for seen in source.values()} == {'cpu'}
    report = fit(model, noisy, source)
    assert [row.name for row in report.layers] == LAYERS
    expected = built()
    before = copy.deepcopy(expected.state_dict())
    fit(expected, NOISY, source)
    for key, value in expected.state_dict().items():
        if value.is_floating_point():
            actual = model.state_dict()[key]
            assert actual.device.type == device.type and actual.dtype == dtype
            assert (actual.cpu() - value).norm() <= tolerance * value.norm(), key
    assert any(not torch.equal(value, before[key]) for key, value in expected.state_dict().items())

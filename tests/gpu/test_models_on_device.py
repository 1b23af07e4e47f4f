"""Backbones of the libraries and VMamba on a device: fused as denoised, fitted, trained."""

from importlib import import_module

import pytest
import torch
from mmengine.registry import MODELS

from helpers import randomise, relative
from mmdenoiserep import apply_denoiserep, fuse_model, verify_fusion
from mmdenoiserep.core import collect_moments, fit_domain, select_layers
from mmdenoiserep.core.fusing.verify import TOLERANCES

pytestmark = pytest.mark.gpu

BACKBONES = {
    'ResNet of mmpretrain': dict(type='mmpretrain.ResNet', depth=18, base_channels=16, stem_channels=16),
    'ViT of mmpretrain': dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
        img_size=64,
        patch_size=16,
    ),
    'Swin of mmpretrain': dict(
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=16, depths=[2, 2], num_heads=[1, 2]),
        img_size=64,
        window_size=4,
        out_indices=(0, 1),
    ),
    'Swin of mmdet': dict(
        type='mmdet.SwinTransformer', embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)
    ),
    'MiT of mmseg': dict(
        type='mmseg.MixVisionTransformer',
        embed_dims=16,
        num_stages=2,
        num_layers=[1, 1],
        num_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        sr_ratios=[8, 4],
        out_indices=(0, 1),
    ),
    'VMamba': dict(type='VMamba', arch=dict(dims=(16, 32), depths=(1, 1), ssm_ratio=2.0), out_indices=(0, 1)),
}


def build(name):
    """Returns a backbone with random weights; mmdet and mmseg need the compiled operators of mmcv."""
    config = BACKBONES[name]
    library = config['type'].partition('.')[0]
    if library in ('mmdet', 'mmseg'):
        pytest.importorskip('mmcv.ops', reason=f'{name}: left out without the compiled operators of mmcv')
    import_module('mmdenoiserep.models' if library == 'VMamba' else f'{library}.models')
    torch.manual_seed(0)
    model = randomise(MODELS.build(config))
    model.eval()  # of mmpretrain, it returns None
    return model


def images(device, seed=0, dtype=torch.float32):
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', BACKBONES)
@torch.no_grad()
def test_the_fused_backbone_is_the_denoised_one(name, dtype, device):
    """Half precision by autocast, since a Swin in half precision fails at its masks."""
    model, x = build(name).to(device), images(device)
    apply_denoiserep(model, 'all', rank=4, example_input=x)
    randomise(model)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        assert verify_fusion(model, fuse_model(model), x, tolerance=TOLERANCES[dtype]).ok
        expected = model(x)[-1]
        for key, parameter in model.named_parameters():
            if '.denoiser.' in key:
                parameter.zero_()
        assert relative(model(x)[-1], expected) > 0.05, 'the denoisers matter'


@pytest.mark.parametrize('name', BACKBONES)
@torch.no_grad()
@pytest.mark.usefixtures('full_precision')
def test_a_fit_on_the_device_is_that_of_the_cpu(name, device):
    """Of the output for noisy images: closer to that of the CPU's fit than to the model before it, by far."""
    outputs = []
    for place in (torch.device('cpu'), device):
        model = build(name).to(place)
        layers = select_layers(model, 'all', example_input=images(place))
        source = collect_moments(model, layers, [images(place, seed) for seed in range(4)])
        noisy = [2 * images(place, seed) + 0.5 for seed in range(4, 8)]
        before = model(noisy[0])[-1].cpu()
        fit_domain(model, layers, noisy, source)
        outputs.append(model(noisy[0])[-1].cpu())
    assert relative(outputs[1], outputs[0]) < 0.05 < relative(before, outputs[0])


@pytest.mark.usefixtures('full_precision')
def test_the_scan_of_vmamba_trains_on_the_device(device):
    """Outputs and gradients against the CPU in float64, then under autocast."""
    found = []
    for place, dtype in (('cpu', torch.float64), (device, torch.float32)):
        model = build('VMamba').to(place, dtype)
        output = model(images(place, dtype=dtype))[-1]
        output.square().mean().backward()
        found.append([output.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm() + 1e-7
    for dtype in (torch.float16, torch.bfloat16):
        with torch.no_grad(), torch.autocast(device.type, dtype):
            assert relative(model(images(device))[-1], found[0][0].to(device)) < TOLERANCES[dtype]

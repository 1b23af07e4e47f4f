"""What is peculiar about single layers of the libraries' backbones, on small versions of the real classes.

All of it in float64, with random denoisers, BatchNorm statistics and parameters.
"""

import copy

import mmdet.models
import mmpretrain.models
import mmseg.models
import pytest
import torch
from mmpretrain.models import BEiTViT, SwinTransformerV2
from mmseg.models import MixVisionTransformer, ResNetV1c
from torch import nn

from helpers import randomise
from mmdenoiserep import apply_denoiserep, fuse_model, verify_fusion

SWIN = dict(embed_dims=16, depths=[2, 2], num_heads=[2, 4])
BLOCKS = [f'stages.{stage}.blocks.{block}' for stage in '01' for block in '01']


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shaken(backbone):
    """Return a backbone in float64 and eval mode with noise on every parameter: no bias is zero, no norm plain."""
    backbone = randomise(backbone.double())
    generator = torch.Generator().manual_seed(2)
    for parameter in backbone.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    backbone.eval()
    return backbone


def convert(backbone, x, targets='all', **options):
    """Return a denoised copy with random denoisers and the report; its layers by name are in the report's order."""
    model = copy.deepcopy(backbone)
    report = apply_denoiserep(model, targets, example_input=x[:1], **options)
    assert report.order == 'execution'
    return randomise(model), report


def names(report):
    return [row.name for row in report.layers]


def check_exact(model, vanilla, x, effect=1e-2):
    """Fused equals denoised to 1e-9, and both differ from vanilla by more than the effect."""
    exact, against_vanilla = verify_fusion(model, example_input=x, tolerance=1e-9), verify_fusion(model, vanilla, x)
    assert exact.ok, str(exact)
    assert min(difference.max_rel for difference in against_vanilla.differences) > effect, str(against_vanilla)


def record(model, x, *layers):
    """Runs a model and returns (input, output) of some of its modules by name."""
    seen, model = {}, copy.deepcopy(model)
    for name in layers:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0], output)})
        )
    with torch.no_grad():
        model(x)
    return seen


def swin_v2():
    return SwinTransformerV2(
        {**SWIN, 'extra_norm_every_n_blocks': 0}, img_size=64, window_size=8, drop_path_rate=0, out_indices=(0, 1)
    )


def token_variance(x):
    return x.var(-1, unbiased=False)


def test_swin_v2_inputs_are_not_normalised():
    """Its norms come after attention and MLP: both read the residual stream itself, whose variance is not one.

    Swin's qkv and first MLP layer read the output of a norm in front of them. The fusion is exact for both.
    """
    x = images(64, 64)
    v1 = mmdet.models.SwinTransformer(**SWIN, strides=(4, 2), out_indices=(0, 1), window_size=8).double()
    v2 = swin_v2().double()
    v1.eval(), v2.eval()
    block = v2.stages[0].blocks[1]
    seen = record(v2, x, *(f'stages.0.blocks.1{part}' for part in ('', '.attn', '.norm1', '.ffn', '.norm2')))
    stream, result = seen['stages.0.blocks.1']
    assert seen['stages.0.blocks.1.attn'][0] is stream
    middle = stream + seen['stages.0.blocks.1.norm1'][1]
    assert torch.equal(seen['stages.0.blocks.1.ffn'][0], middle)
    assert torch.equal(result, middle + seen['stages.0.blocks.1.norm2'][1])
    for name in ('attn', 'ffn'):
        assert token_variance(seen[f'stages.0.blocks.1.{name}'][0]).median() > 2
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in (block.norm1, block.norm2))

    layers = ['stages.0.blocks.1.attn.w_msa.qkv', 'stages.0.blocks.1.ffn.layers.0.0']
    for tokens, _ in record(v1, x, *layers).values():
        assert (token_variance(tokens) - 1).abs().max() < 1e-2

    vanilla = shaken(swin_v2())
    model, report = convert(vanilla, x, 'mlp')
    assert names(report) == [f'{block}.ffn.layers.{layer}' for block in BLOCKS for layer in ('0.0', '1')]
    assert not report.skipped
    check_exact(model, vanilla, x)


def test_swin_v2_qkv_is_bypassed():
    """It is computed from its weight and two biases of the parent: every one is skipped by name, with the reason."""
    vanilla, x = shaken(swin_v2()), images(64, 64)
    model, report = convert(vanilla, x)
    expected = {f'{block}.attn.w_msa.qkv' for block in BLOCKS}
    assert set(report.skipped) == expected
    assert all(reason.startswith('bypassed') for reason in report.skipped.values())
    assert all(name in str(report) for name in expected)
    assert {f'{block}.attn.w_msa.proj' for block in BLOCKS} < set(names(report))
    with pytest.raises(ValueError, match=r"'\.\*qkv' matches no layer .* it matches stages.*qkv, but: bypassed"):
        convert(vanilla, x, r'.*qkv')


def test_swin_v2_position_bias():
    """No preset takes cpb_mlp, which sees a table of coordinates; a pattern may name it, and then it fuses exactly."""
    vanilla, x = shaken(swin_v2()), images(64, 64)
    for preset in ('all', 'linear', 'mlp'):
        _, report = convert(vanilla, x, preset)
        assert not any('cpb_mlp' in name for name in (*names(report), *report.skipped))
    model, report = convert(vanilla, x, r'.*\.cpb_mlp\.\d')
    assert names(report) == [f'{block}.attn.w_msa.cpb_mlp.{layer}' for block in BLOCKS for layer in (0, 2)]
    first, last = (model.stages[0].blocks[0].attn.w_msa.cpb_mlp[i] for i in (0, 2))
    assert first.denoiser.bias is not None
    assert last.bias is None and last.denoiser.bias is None
    check_exact(model, vanilla, x, effect=1e-4)
    both, report = convert(vanilla, x, ['all', r'.*\.cpb_mlp\.\d'])
    assert len(report.layers) == len(convert(vanilla, x)[1].layers) + 2 * len(BLOCKS)
    check_exact(both, vanilla, x)


PADDED_SWINS = {
    'mmdet': lambda: mmdet.models.SwinTransformer(**SWIN, strides=(4, 2), out_indices=(0, 1), window_size=7),
    'mmseg': lambda: mmseg.models.SwinTransformer(**SWIN, strides=(4, 2), out_indices=(0, 1), window_size=7),
    'mmpretrain': lambda: mmpretrain.models.SwinTransformer(
        SWIN, img_size=(40, 52), window_size=7, out_indices=(0, 1), pad_small_map=True
    ),
}


@pytest.mark.parametrize('library', PADDED_SWINS)
def test_zero_padded_window_cells(library):
    """Windows that stick out of the map have cells of zeros behind the norm, and the denoiser's bias acts there too.

    40 x 52 pixels are 10 x 13 tokens, padded to 14 x 14: 66 cells of zeros an image. They are keys and values for the
    others, so what becomes of them matters. The correction sits on the input of qkv, behind the padding, where the
    fused layer has it; in front of the padding it would be wrong.
    """
    vanilla, x = shaken(PADDED_SWINS[library]()), images(40, 52)
    model, report = convert(vanilla, x, r'.*\.qkv')
    assert names(report) == [f'{block}.attn.w_msa.qkv' for block in BLOCKS]
    fused = fuse_model(model)

    tokens, output = record(model, x, names(report)[0])[names(report)[0]]
    padded = (tokens == 0).all(-1)
    assert tokens.shape[1] == 49
    assert padded.sum() == 2 * (14 * 14 - 10 * 13)
    layer = model.get_submodule(names(report)[0])
    expected = layer.bias - layer.weight @ layer.denoiser.bias
    assert (output[padded] - expected).abs().max() < 1e-12
    assert (layer.weight @ layer.denoiser.bias).abs().max() > 0.05
    check_exact(model, vanilla, x)

    for name in names(report):
        layer = model.get_submodule(name)
        correct = layer.correct
        layer.correct = lambda x, correct=correct: correct(x).where((x != 0).any(-1, keepdim=True), x)
    assert not verify_fusion(model, fused, x).ok


def test_dilated_resnet_with_sync_batchnorm():
    """FCN's ResNetV1c-D8: deep stem, dilations in place of strides, no conv with a bias, so no denoiser with one."""
    backbone = ResNetV1c(
        depth=50,
        stem_channels=8,
        base_channels=8,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False,
    )
    vanilla, x = shaken(backbone), images(64, 48)
    model, report = convert(vanilla, x, 'conv2d')
    assert not report.skipped
    assert len(report.layers) == 3 + 16 * 3 + 4
    assert names(report)[:3] == ['stem.0', 'stem.3', 'stem.6']
    layers = [model.get_submodule(name) for name in names(report)]
    assert all(layer.bias is None and layer.denoiser.bias is None for layer in layers)
    dilations = {stage: [block.conv2.dilation[0] for block in getattr(model, f'layer{stage}')] for stage in range(1, 5)}
    assert dilations == {1: [1] * 3, 2: [1] * 4, 3: [1] + [2] * 5, 4: [2] + [4] * 2}
    assert [tuple(output.shape[-2:]) for output in model(x)] == [(16, 12), (8, 6), (8, 6), (8, 6)]
    check_exact(model, vanilla, x)

    fused = fuse_model(model)
    assert [type(module) for module in fused.modules()] == [type(module) for module in vanilla.modules()]
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == 55
    copy.deepcopy(vanilla).load_state_dict(fused.state_dict(), strict=True)


def test_mit_convolutions_and_attention():
    """Its MLPs are convolutions 1x1, depthwise 3x3, 1x1; its attention is torch's, whose projections stay as they are.

    A denoiser has a bias where the conv has one and pads nothing: the 1x1 convs and the spatial reduction of the
    attention. The depthwise convs and the patch embeddings pad zeros. The depthwise denoiser is a diagonal.
    """
    vanilla = shaken(MixVisionTransformer(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]))
    x = images(64, 64)
    model, report = convert(vanilla, x)
    assert set(report.skipped) == {f'layers.{stage}.1.0.attn.attn.out_proj' for stage in range(4)}
    assert all(reason and name in str(report) for name, reason in report.skipped.items())
    assert not any('in_proj' in name for name in names(report))
    for stage in model.layers:
        ffn = stage[1][0].ffn.layers
        assert all(conv.bias is not None for conv in (stage[0].projection, ffn[0], ffn[1], ffn[4]))
        assert ffn[0].denoiser.bias is not None and ffn[4].denoiser.bias is not None
        assert stage[0].projection.denoiser.bias is None and ffn[1].denoiser.bias is None
        assert ffn[1].groups == ffn[1].in_channels
        assert ffn[1].denoiser.weight.shape == (ffn[1].in_channels, 1, 1)
    reductions = [name for name in names(report) if name.endswith('.sr')]
    assert reductions == [f'layers.{stage}.1.0.attn.sr' for stage in range(3)]
    assert all(model.get_submodule(name).denoiser.bias is not None for name in reductions)


@pytest.mark.parametrize('layers', ['(0|4)', '1'], ids=['1x1', 'depthwise'])
def test_mit_mlp_by_pattern(layers):
    """The preset 'mlp' takes Linear layers only, so the configs name these convolutions; each kind fuses exactly."""
    vanilla = shaken(MixVisionTransformer(embed_dims=8, num_layers=[2, 1, 1, 1], num_heads=[1, 2, 2, 4]))
    x = images(64, 64)
    with pytest.raises(ValueError, match="'mlp' matches no layer"):
        convert(vanilla, x, 'mlp')
    model, report = convert(vanilla, x, rf'layers\.\d+\.1\.\d+\.ffn\.layers\.{layers}')
    assert len(report.layers) == 5 * len(layers.strip('()').split('|'))
    check_exact(model, vanilla, x)


@pytest.mark.parametrize('bias', ['qv_bias', True, False])
def test_beit_qkv(bias):
    """Attention with a q and a v bias of its own bypasses qkv, which is skipped; with a plain bias or none it fuses."""
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    backbone = BEiTViT(arch, img_size=32, patch_size=8, bias=bias, drop_path_rate=0, out_type='featmap')
    vanilla, x = shaken(backbone), images()
    model, report = convert(vanilla, x)
    layers = [f'layers.{block}.attn.qkv' for block in range(2)]
    if bias == 'qv_bias':
        assert vanilla.layers[0].attn.q_bias.abs().min() > 0
        assert list(report.skipped) == layers
        assert all(reason.startswith('bypassed') for reason in report.skipped.values())
    else:
        assert not report.skipped
        assert set(layers) < set(names(report))
        assert all((model.get_submodule(name).denoiser.bias is not None) == bias for name in layers)
    assert 'layers.1.attn.proj' in names(report)
    check_exact(model, vanilla, x)

"""The factory: DenoiseRepBackbone in the registries, loading, freezing and optimizers of the OpenMMLab libraries."""

import pickle
from types import SimpleNamespace

import mmdet.engine
import mmdet.models
import mmpretrain.engine
import mmpretrain.models
import mmseg.engine
import mmseg.models
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModule, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine_helpers import (
    TINY_SWIN,
    assert_equal,
    denoised,
    is_denoiser,
    log_of,
    make_runner,
    message,
    refuse,
    split,
    tiny_model,
)
from helpers import copied, equal, randomise
from mmdenoiserep.core import DenoiseLayer, NoiseSchedule, denoise_losses, fuse_model
from mmdenoiserep.core.method.record import find_records

LIBRARIES = {'mmdet': mmdet, 'mmseg': mmseg, 'mmpretrain': mmpretrain}
CONVNEXT_ARCH = dict(depths=[1, 1, 1, 1], channels=[4, 8, 8, 12])
SWIN = TINY_SWIN | dict(type='SwinTransformer')
RESNET = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
BACKBONES = {
    'mmdet-swin': ('mmdet', SWIN),
    'mmdet-resnet': ('mmdet', RESNET | dict(norm_eval=False)),
    'mmseg-swin': ('mmseg', SWIN),
    'mmseg-resnet': ('mmseg', RESNET | dict(type='ResNetV1c', norm_eval=False)),
    'mmpretrain-swin': (
        'mmpretrain',
        dict(
            type='SwinTransformer',
            arch=dict(embed_dims=12, depths=[1, 1], num_heads=[1, 2]),
            img_size=32,
            window_size=4,
            out_indices=(1,),
        ),
    ),
    'mmpretrain-resnet': ('mmpretrain', RESNET),
    'mmpretrain-convnext': ('mmpretrain', dict(type='ConvNeXt', arch=CONVNEXT_ARCH)),
    'mmpretrain-vit': (
        'mmpretrain',
        dict(
            type='VisionTransformer',
            arch=dict(embed_dims=12, num_layers=2, num_heads=2, feedforward_channels=24),
            img_size=32,
            patch_size=8,
        ),
    ),
}


@MODELS.register_module()
class NestedBackbone(BaseModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return (dict(features=[self.conv(x)]),)


def build(scope, config, convert=True, **options):
    wrapped = dict(type='DenoiseRepBackbone', backbone=config, image_size=32, **options) if convert else config
    with DefaultScope.overwrite_default_scope(scope):
        return LIBRARIES[scope].registry.MODELS.build(ConfigDict(wrapped))  # as a config file gives it


def init_weights(scope, *models):
    with DefaultScope.overwrite_default_scope(scope):
        for model in models:
            model.init_weights()


def tensors(output):
    return [output] if isinstance(output, torch.Tensor) else [x for value in output for x in tensors(value)]


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(model):
    model.eval()
    with torch.no_grad():
        return tensors(model(images().to(next(model.parameters()).dtype)))


@pytest.mark.parametrize('name', BACKBONES)
def test_factory_returns_the_inner_backbone_itself(name):
    """From every library: the class of the inner config, all of its parameters under their names, plus denoisers."""
    scope, config = BACKBONES[name]
    module, vanilla = build(scope, config), build(scope, config, convert=False)
    assert type(module) is type(vanilla)
    assert type(module).__module__.startswith(f'{scope}.')
    own, base = split(module.state_dict())
    assert own and list(base) == list(vanilla.state_dict())
    layers = sum(isinstance(m, DenoiseLayer) for m in module.modules())
    assert layers == len({key.partition('.denoiser.')[0] for key in own})


@pytest.mark.parametrize('name', BACKBONES)
def test_vanilla_checkpoint_loads_and_gives_the_same_features(name):
    """Missing keys are exactly the denoisers, no key is unexpected, and fresh denoisers change no bit."""
    scope, config = BACKBONES[name]
    module, vanilla = build(scope, config), randomise(build(scope, config, convert=False))
    with torch.no_grad():
        for parameter in vanilla.parameters():
            parameter.add_(0.01)
    result = module.load_state_dict(vanilla.state_dict(), strict=False)
    assert sorted(result.missing_keys) == sorted(key for key in module.state_dict() if is_denoiser(key))
    assert result.missing_keys and not result.unexpected_keys
    ours, theirs = features(module), features(vanilla)
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize('name', BACKBONES)
def test_fused_backbone_equals_the_denoised_one(name):
    """What the factory converts fuses exactly, in float64 with random denoisers and BatchNorm statistics."""
    scope, config = BACKBONES[name]
    module = randomise(build(scope, config).double())
    vanilla = build(scope, config, convert=False).double()
    fused = fuse_model(module)
    own = type(module).__module__.startswith('mmdenoiserep')  # VMamba
    assert b'mmdenoiserep' in pickle.dumps(module)
    assert own or b'mmdenoiserep' not in pickle.dumps(fused)
    vanilla.load_state_dict(fused.state_dict(), strict=True)
    for ours, theirs in zip(features(module), features(vanilla), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * ours.abs().max()
        assert ours.abs().max() > 0
    zero = build(scope, config).double()
    zero.load_state_dict(split(module.state_dict())[1], strict=False)
    assert not torch.allclose(features(zero)[-1], features(module)[-1], rtol=1e-2)


@pytest.mark.parametrize(
    ('outer', 'inner', 'library'),
    [
        ('mmseg', dict(type='mmdet.SwinTransformer'), 'mmdet'),
        ('mmpretrain', dict(type='mmseg.SwinTransformer'), 'mmseg'),
        ('mmpretrain', dict(type='SwinTransformer', _scope_='mmdet'), 'mmdet'),
        ('mmdet', dict(type='SwinTransformer', _scope_='mmseg'), 'mmseg'),
    ],
)
def test_scope_of_the_inner_config_is_honoured(outer, inner, library):
    """A prefix of the type or a _scope_ picks the library, whatever the default scope is."""
    module = build(outer, SWIN | inner)
    assert type(module) is LIBRARIES[library].models.backbones.SwinTransformer


def test_scope_of_the_outer_config_reaches_the_inner_one():
    config = dict(type='DenoiseRepBackbone', _scope_='mmseg', backbone=SWIN, image_size=32)
    assert type(MODELS.build(config)) is mmseg.models.backbones.SwinTransformer


def test_config_object_is_left_as_it_was():
    config = Config(dict(model=dict(type='DenoiseRepBackbone', backbone=SWIN, image_size=32, pretrained=None)))
    before = config.to_dict()
    with DefaultScope.overwrite_default_scope('mmdet'):
        MODELS.build(config.model)
    assert config.to_dict() == before


@MODELS.register_module()
class BrokenBackbone(BaseModule):
    def __init__(self):
        super().__init__()
        MODELS.build(dict(type='NoSuchPart'))


@pytest.mark.parametrize(
    ('scope', 'config', 'words'),
    [
        (None, SWIN, ('found no backbone', 'no default scope is set', "'SwinTransformer'", 'mmdet.SwinTransformer')),
        ('mmdet', dict(type='NoSuchNet'), ('found no backbone', "'NoSuchNet'", 'the default scope is mmdet')),
        # errors of other causes pass through
        ('mmdet', dict(depth=18), ('type',)),
        ('mmdet', RESNET | dict(norm_cfg=dict(type='NoSuchNorm')), ('Cannot find',)),
        ('mmdet', dict(type='BrokenBackbone'), ('NoSuchPart is not in the',)),
    ],
)
def test_key_errors(scope, config, words):
    """Only a backbone that no registry has is reported as one, in one line."""
    DefaultScope._instance_dict.clear()
    with pytest.raises(KeyError) as error:
        build(scope, config) if scope else MODELS.build(dict(type='DenoiseRepBackbone', backbone=config))
    text = str(error.value.args[0])
    assert all(word in text for word in words)
    assert ('found no backbone' in text) is ('found no backbone' in words)
    assert '\n' not in text or 'found no backbone' not in words


def test_options_reach_the_conversion():
    scope, config = BACKBONES['mmpretrain-vit']
    module = build(
        scope,
        config,
        targets='mlp',
        exclude=r'layers\.0\..*',
        rank=2,
        denoiser_bias=False,
        schedule=dict(num_timesteps=50),
    )
    own, _ = split(module.state_dict())
    assert {key.partition('.denoiser.')[0] for key in own} == {'layers.1.ffn.layers.0.0', 'layers.1.ffn.layers.1'}
    assert {key.partition('.denoiser.')[2] for key in own} == {'scale', 'up', 'down'}
    layer = module.get_submodule('layers.1.ffn.layers.0.0')
    assert layer.denoiser.up.shape == (1, 12, 2)
    assert layer.timestep == 2
    assert len(layer.schedule) == 50
    assert torch.equal(layer.schedule.betas, NoiseSchedule(num_timesteps=50).betas)


@MODELS.register_module()
class Sizes(BaseModule):
    seen: list = []

    def __init__(self, img_size=32, in_channels=5):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2, 1)

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.conv(x)


@pytest.mark.parametrize('arguments', [dict(img_size=32, in_channels=5), dict()])
@pytest.mark.parametrize(('size', 'expected'), [(None, (32, 32)), (64, (64, 64)), ((32, 48), (32, 48))])
def test_dummy_image_has_the_asked_size(arguments, size, expected):
    """Without image_size it is the img_size that the backbone was built with, by its config or by default."""
    Sizes.seen.clear()
    MODELS.build(dict(type='DenoiseRepBackbone', backbone=dict(type='Sizes', **arguments), image_size=size))
    assert Sizes.seen == [(1, 5, *expected)]


@MODELS.register_module()
class Chans(BaseModule):
    def __init__(self, in_chans=6):
        super().__init__()
        self.late, self.conv = nn.Conv2d(2, 2, 1), nn.Conv2d(in_chans, 2, 1)

    def forward(self, x):
        return self.late(self.conv(x))


@pytest.mark.parametrize(
    ('scope', 'name', 'channels'), [('mmpretrain', 'LeNet5', 1), ('mmdet', 'CSPDarknet', 3), ('mmdet', 'Chans', 6)]
)
def test_dummy_image_has_the_channels_that_the_backbone_takes(scope, name, channels):
    """LeNet5 takes grey images, and the first convolution of CSPDarknet twelve channels of an image of three."""
    module = build(scope, dict(type=name))
    [(_, _, record)] = find_records(module)
    assert record.image_shape == (1, channels, 32, 32)
    assert (record.report.order, record.report.probe_failure) == ('execution', '')
    assert name != 'Chans' or module.conv.timestep == 2 and module.late.timestep == 1


def test_pretrained_of_an_mmseg_segmentor_is_forwarded(tmp_path):
    """The segmentor puts it into the backbone's config; the weights must arrive in the inner backbone."""
    config = RESNET | dict(type='ResNetV1c')
    source = randomise(build('mmseg', config, convert=False))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'vanilla.pth')
    head = dict(type='FCNHead', in_channels=64, channels=4, num_convs=1, num_classes=3, in_index=3)
    segmentor = dict(
        type='EncoderDecoder',
        pretrained=str(tmp_path / 'vanilla.pth'),
        backbone=denoised(config, image_size=32),
        decode_head=head,
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = mmseg.registry.MODELS.build(ConfigDict(segmentor))
        model.init_weights()
    own, base = split(model.backbone.state_dict())
    assert_equal(base, dict(source.state_dict()))
    assert all((value == 0).all() for key, value in own.items() if not key.endswith('.down'))


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize(
    'name', ['mmpretrain-resnet', 'mmdet-swin', 'mmseg-swin', 'mmpretrain-vit', 'mmpretrain-convnext']
)
def test_pretrained_init_cfg(name, rank, tmp_path):
    """init_weights loads every base weight of the checkpoint and leaves the denoisers alone."""
    scope, config = BACKBONES[name]
    source = build(scope, config, convert=False)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.5)
    randomise(source)
    prefix = 'backbone.' if name == 'mmdet-swin' else ''  # it reads nothing else
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'vanilla.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'vanilla.pth'))
    module = build(scope, config | dict(init_cfg=init_cfg), rank=rank)
    fresh, _ = split(copied(module.state_dict()))
    init_weights(scope, module)
    own, base = split(module.state_dict())
    assert_equal(base, dict(source.state_dict()))
    assert_equal(own, fresh)


def test_convert_weights_of_swin(tmp_path):
    """A checkpoint with the names of the official Swin is converted and loaded as in the vanilla backbone."""
    official = {}
    source = build('mmdet', SWIN, convert=False)
    for key, value in source.state_dict().items():
        if 'relative_position_index' in key:
            continue
        for ours, theirs in (
            ('ffn.layers.0.0.', 'mlp.fc1.'),
            ('ffn.layers.1.', 'mlp.fc2.'),
            ('attn.w_msa.', 'attn.'),
            ('patch_embed.projection.', 'patch_embed.proj.'),
            ('stages.', 'layers.'),
        ):
            key = key.replace(ours, theirs)
        official[key] = torch.randn_like(value)
    assert 'layers.0.blocks.0.mlp.fc1.weight' in official
    torch.save(dict(model=official), tmp_path / 'official.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'official.pth'))
    config = SWIN | dict(init_cfg=init_cfg, convert_weights=True)
    module, vanilla = build('mmdet', config), build('mmdet', config, convert=False)
    init_weights('mmdet', module, vanilla)
    own, base = split(module.state_dict())
    assert_equal(base, dict(vanilla.state_dict()))
    assert torch.equal(base['stages.0.blocks.0.ffn.layers.0.0.weight'], official['layers.0.blocks.0.mlp.fc1.weight'])
    assert own and all((value == 0).all() for key, value in own.items() if not key.endswith('.down'))


@pytest.mark.parametrize('name', ['mmdet-swin', 'mmseg-resnet', 'mmpretrain-resnet'])
def test_random_init_does_not_touch_denoisers(name):
    """init_weights without a checkpoint re-initialises every nn.Linear and Conv2d it finds; denoisers are none."""
    scope, config = BACKBONES[name]
    module = randomise(build(scope, config, rank=2))
    own, base = split(copied(module.state_dict()))
    init_weights(scope, module)
    after = split(module.state_dict())
    assert_equal(after[0], own)
    assert not equal(after[1], base)


@pytest.mark.parametrize(
    ('name', 'stages'), [('mmpretrain-resnet', 2), ('mmdet-resnet', 1), ('mmdet-swin', 1), ('mmseg-swin', 0)]
)
def test_frozen_stages(name, stages):
    """What the backbone freezes stays frozen after train(), and so do the denoisers of those layers, only those."""
    scope, config = BACKBONES[name]
    config = config | dict(frozen_stages=stages)
    module, vanilla = build(scope, config), build(scope, config, convert=False)
    for _ in range(2):
        module.train()
        vanilla.train()
        actual = {key: p.requires_grad for key, p in module.named_parameters() if not is_denoiser(key)}
        assert actual == {key: p.requires_grad for key, p in vanilla.named_parameters()}
        layers = [m for m in module.modules() if isinstance(m, DenoiseLayer)]
        assert all(p.requires_grad is m.weight.requires_grad for m in layers for p in m.denoiser.parameters())
        assert {m.weight.requires_grad for m in layers} == {True, False}
        modes = {key: m.training for key, m in module.named_modules() if 'denoiser' not in key}
        assert modes == {key: m.training for key, m in vanilla.named_modules()}
        module.eval()
        vanilla.eval()


@pytest.mark.parametrize('name', ['mmpretrain-resnet', 'mmdet-resnet', 'mmseg-resnet'])
@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval(name, norm_eval):
    """With norm_eval every BatchNorm stays in eval mode in training, as in the vanilla backbone."""
    scope, config = BACKBONES[name]
    module = build(scope, config | dict(norm_eval=norm_eval))
    module.train()
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    assert norms and all(m.training is not norm_eval for m in norms)
    assert any(m.training for m in module.modules() if isinstance(m, DenoiseLayer))


def test_sync_batchnorm_is_reverted_in_place():
    module = build('mmdet', RESNET | dict(norm_cfg=dict(type='SyncBN'), norm_eval=False))
    before = {key for key in module.state_dict() if is_denoiser(key)}
    module = revert_sync_batchnorm(module)
    assert {key for key in module.state_dict() if is_denoiser(key)} == before
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())


class Detector(nn.Module):
    """The least that the layer-decay constructors of mmdet and mmseg need."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(12, 2)


def optimizer_settings(scope, model, config):
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(model, Config(config)._cfg_dict)
    settings = {id(p): (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups for p in g['params']}
    return {name: settings[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ('scope', 'constructor', 'paramwise'),
    [
        ('mmdet', 'LearningRateDecayOptimizerConstructor', dict(decay_rate=0.7, decay_type='layer_wise', num_layers=6)),
        ('mmdet', 'LearningRateDecayOptimizerConstructor', dict(decay_rate=0.7, decay_type='stage_wise', num_layers=6)),
        ('mmseg', 'LearningRateDecayOptimizerConstructor', dict(decay_rate=0.7, decay_type='stage_wise', num_layers=6)),
        ('mmseg', 'LearningRateDecayOptimizerConstructor', dict(decay_rate=0.7, decay_type='layer_wise', num_layers=6)),
        (
            'mmpretrain',
            'LearningRateDecayOptimWrapperConstructor',
            dict(layer_decay_rate=0.7, norm_decay_mult=0.0, custom_keys={'.denoiser.': dict(decay_mult=0.0)}),
        ),
    ],
)
def test_layer_decay(scope, constructor, paramwise):
    """Base parameters get the learning rate and decay of the vanilla model; a denoiser gets the rate of its layer."""
    config = dict(
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), constructor=constructor, paramwise_cfg=paramwise
    )
    backbone = dict(type='mmpretrain.ConvNeXt', arch=CONVNEXT_ARCH)
    settings = []
    for convert in (True, False):
        inner = build(scope, backbone, convert)
        if scope == 'mmpretrain':
            model = mmpretrain.models.ImageClassifier(backbone=inner, head=mmpretrain.models.LinearClsHead(3, 12))
        else:
            model = Detector(inner)
        settings.append(optimizer_settings(scope, model, config))
    own, base = split(settings[0])
    assert base == settings[1]
    assert len({rate for rate, _ in base.values()}) > 3
    assert own
    for name, (rate, decay) in own.items():
        assert rate == base[name.partition('denoiser.')[0] + 'weight'][0]
        if scope == 'mmpretrain':
            assert decay == 0


def test_custom_keys_of_the_default_constructor():
    """The key .denoiser. is longer than backbone, so it wins for the denoisers and for nothing else."""
    settings = []
    for key in ('.denoiser.', 'denoiser'):
        model = Detector(build('mmdet', SWIN))
        keys = {'backbone': dict(lr_mult=0.1), key: dict(lr_mult=10.0, decay_mult=0.0)}
        config = dict(optimizer=dict(type='SGD', lr=1e-3, weight_decay=0.05), paramwise_cfg=dict(custom_keys=keys))
        settings.append(split(optimizer_settings('mmdet', model, config)))
    (own, base), (lost, same) = settings
    assert own and set(own.values()) == {(1e-2, 0.0)}
    assert base == same
    assert {base[name] for name in base if name.startswith('backbone.')} == {(1e-4, 0.05)}
    assert set(lost.values()) == {(1e-4, 0.05)}  # the trap: of keys as long as each other the alphabet decides


def test_conversion_is_logged_once(case):
    runner = make_runner(case, tiny_model())
    text = log_of(runner)
    assert text.count('DenoiseRep on engine_helpers.TinyBackbone') == 1
    assert text.count('layers denoised, steps 3 to 1 in execution order') == 1
    assert all(f'\n{name} ' in text for name in ('stem', 'conv', 'shared'))


@pytest.mark.parametrize('backbone', [dict(type='TinyBackbone'), dict(type='NestedBackbone')])
def test_training_without_the_loss_hook_is_refused(backbone):
    module = MODELS.build(denoised(backbone))
    module.train()
    output = module(images(9))
    loss = output[0]['features'][0].sum() if isinstance(output[0], dict) else output[0].sum()
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    assert "custom_hooks = [dict(type='DenoiseLossHook')]" in message(error)


@pytest.mark.parametrize('pack', [lambda x: SimpleNamespace(features=x), lambda x: InstanceData(features=x)])
def test_outputs_that_are_objects_are_guarded_too(pack):
    module = MODELS.build(denoised())
    module.train()
    forward = module.forward
    module.forward = lambda x: pack(forward(x)[0])
    with pytest.raises(RuntimeError, match='without the loss of its denoisers'):
        module(images(9)).features.sum().backward()


def test_other_uses_without_the_loss_hook_are_not_refused():
    """In eval mode, without gradients, or in training mode without a backward pass the model just runs."""
    module = MODELS.build(denoised())
    module.train()
    assert module(images(9))[0].requires_grad
    with torch.no_grad():
        assert not module(images(9))[0].requires_grad
    module.eval()
    module(images(9))[0].sum().backward()
    assert module.stem.weight.grad is not None


def test_a_training_loop_in_plain_pytorch_is_not_refused():
    """``denoise_losses`` adds the loss of the denoisers just as the hook does."""
    module = MODELS.build(denoised())
    module.train()
    with denoise_losses(module) as losses:
        (module(images(9))[0].sum() + losses.mean()).backward()
    assert all(p.grad is not None for p in module.conv.denoiser.parameters())
    with pytest.raises(RuntimeError, match='without the loss of its denoisers'):
        module(images(9))[0].sum().backward()


@MODELS.register_module()
class NamedLikeTheRecord(BaseModule):
    """Has an attribute of the name under which a denoised backbone is described."""

    def __init__(self):
        super().__init__()
        self.denoiserep = nn.Linear(3, 3)


def test_an_attribute_of_the_user_is_not_overwritten():
    with pytest.raises(ValueError, match='NamedLikeTheRecord has an attribute denoiserep of its own'):
        MODELS.build(dict(type='DenoiseRepBackbone', backbone=dict(type='NamedLikeTheRecord')))


def test_a_run_without_the_loss_hook_stops_in_its_first_iteration(case):
    refuse(make_runner(case, tiny_model()), 'without the loss of its denoisers', RuntimeError)

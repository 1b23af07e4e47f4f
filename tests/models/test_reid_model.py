"""Re-identification: the loss, the head, and ViTs that are no squares."""

import argparse
import math

import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

from engine_helpers import message
from helpers import randomise, relative
from mmdenoiserep import fuse_model
from mmdenoiserep.core import InputError
from mmdenoiserep.models.reid_vit import source_grid
from mmdenoiserep.tasks.reid import BNNeckReIDHead, PKSampler, ReIDVisionTransformer, batch_hard_triplet_loss
from tools_helpers import run_tool, sentence


def triplets(features, identities, margin):
    losses = []
    for i, anchor in enumerate(features):
        distances = [math.dist(anchor.tolist(), other.tolist()) for other in features]
        farthest = max(d for d, pid in zip(distances, identities, strict=True) if pid == identities[i])
        nearest = min(d for d, pid in zip(distances, identities, strict=True) if pid != identities[i])
        excess = farthest - nearest
        losses.append(math.log1p(math.exp(excess)) if margin is None else max(0.0, excess + margin))
    return sum(losses) / len(losses)


@pytest.mark.parametrize('margin', [None, 0.3, 2.0])
def test_the_triplet_loss_is_that_of_the_hardest_pairs(margin):
    features = torch.randn(12, 5, dtype=torch.float64)
    identities = torch.arange(3).repeat(4)
    expected = triplets(features, identities.tolist(), margin)
    assert batch_hard_triplet_loss(features, identities, margin).item() == pytest.approx(expected, rel=1e-12)


def test_a_triplet_loss_by_hand():
    """On a line: a at 0 and 1, b at 3. Anchors 0, 1 and 3 have excesses 1 - 3, 1 - 2 and 0 - 2."""
    features, identities = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
    assert batch_hard_triplet_loss(features, identities, margin=1.5).item() == pytest.approx(0.5 / 3)
    soft = (math.log1p(math.exp(-2)) * 2 + math.log1p(math.exp(-1))) / 3
    assert batch_hard_triplet_loss(features, identities).item() == pytest.approx(soft)


@pytest.mark.parametrize('margin', [None, 0.3])
def test_gradients_are_finite_for_equal_images_and_for_one_identity(margin):
    for identities in (torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long)):
        features = torch.ones(4, 3).requires_grad_()
        batch_hard_triplet_loss(features, identities, margin).backward()
        assert torch.isfinite(features.grad).all()


def test_the_triplet_loss_is_computed_in_float32_under_autocast():
    features = (torch.randn(8, 16) * 0.01 + 100).requires_grad_()
    identities = torch.arange(2).repeat(4)
    expected = batch_hard_triplet_loss(features, identities)
    with torch.autocast('cpu', torch.bfloat16):
        actual = batch_hard_triplet_loss(features, identities)
    assert actual.dtype == torch.float32 and actual == expected


def head(**options):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    head = MODELS.build(dict(type='BNNeckReIDHead', num_classes=3, in_channels=6, **options))
    head.init_weights()
    return head


def samples(identities):
    return [DataSample().set_gt_label(pid) for pid in identities]


def test_the_head_is_as_published():
    model = head()
    assert model.classifier.bias is None and 0 < model.classifier.weight.abs().max() < 0.01
    assert not model.bnneck.bias.requires_grad and not model.bnneck.bias.any()
    feats = (torch.randn(8, 6),)
    sum(model.loss(feats, samples([0, 0, 1, 1, 2, 2, 0, 1])).values()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {'bnneck.weight', 'classifier.weight'}


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_losses_see_the_feature_before_and_the_scores_after_the_neck(smoothing):
    """With the label smoothing of mmpretrain, for example, as the identity loss."""
    loss = dict(loss=dict(type='LabelSmoothLoss', label_smooth_val=smoothing, mode='original')) if smoothing else {}
    model = head(margin=0.3, triplet_weight=0.5, **loss)
    feature = torch.randn(6, 6)
    identities = torch.tensor([0, 0, 1, 1, 2, 2])
    losses = model.loss((torch.zeros(6, 1), feature), samples(identities.tolist()))
    scores = model.classifier(nn.functional.batch_norm(feature, None, None, model.bnneck.weight, training=True))
    assert losses.keys() == {'loss_id', 'loss_triplet'}
    expected = nn.functional.cross_entropy(scores, identities, label_smoothing=smoothing)
    torch.testing.assert_close(losses['loss_id'], expected)
    torch.testing.assert_close(losses['loss_triplet'], 0.5 * batch_hard_triplet_loss(feature, identities, 0.3))


@pytest.mark.parametrize('where', ['before', 'after'])
def test_what_is_compared_is_before_or_after_the_neck(where):
    feature, model = torch.randn(4, 6), head(**(dict(test_feature='after') if where == 'after' else {})).eval()
    model.bnneck.running_mean.normal_()
    after = model.bnneck(feature)
    assert not torch.equal(feature, after)
    given = samples([0, 1, 2, 0])
    predicted = model.predict((feature,), given)
    assert [id(p) for p in predicted] == [id(g) for g in given]
    assert all(p.pred_feature.untyped_storage().nbytes() == p.pred_feature.nbytes for p in predicted), 'holds a batch'
    for found in (predicted, model.predict((feature,))):
        assert torch.equal(torch.stack([p.pred_feature for p in found]), after if where == 'after' else feature)


@pytest.mark.parametrize(('options', 'word'), [(dict(test_feature='neck'), 'neck'), (dict(margin=-1.0), '-1.0')])
def test_wrong_options_of_the_head_are_named(options, word):
    with pytest.raises(InputError) as error:
        BNNeckReIDHead(3, 6, **options)
    assert word in message(error)


ARCH = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=16)


def vit(height, width, **options):
    return ReIDVisionTransformer(ARCH, img_size=(height, width), patch_size=16, interpolate_mode='bilinear', **options)


@pytest.mark.parametrize(
    ('tokens', 'target', 'grid'),
    [(196, (16, 8), (14, 14)), (128, (24, 8), (16, 8)), (128, (8, 16), (8, 16)), (210, (16, 8), (21, 10))],
)
def test_the_grid_of_a_checkpoint(tokens, target, grid):
    assert source_grid(tokens, target) == grid
    with pytest.raises(ValueError) as error:
        source_grid(127, target)
    assert '127' in message(error) and f'{target[0]} x {target[1]}' in message(error)


@pytest.mark.parametrize('size', [(224, 224), (256, 128), (128, 64)])
def test_encodings_are_resized_between_grids_that_are_no_squares(size):
    """Encodings that are linear in row and column stay so, away from the border."""
    source, target = vit(*size), vit(384, 128)
    rows, columns = source.patch_embed.init_out_size
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    grid = torch.stack([y[:, None].expand(rows, columns), x[None].expand(rows, columns)], -1)
    state = source.state_dict()
    state['pos_embed'] = torch.zeros_like(state['pos_embed'])
    state['pos_embed'][0, 1:, :2] = grid.reshape(-1, 2)
    state['pos_embed'][0, 0] = 7
    target.load_state_dict(state)
    loaded = target.pos_embed[0, 1:].reshape(24, 8, 8)
    assert (target.pos_embed[0, 0] == 7).all(), 'the class token has no place'
    torch.testing.assert_close(loaded[6:-6, 2, 0], (torch.arange(6, 18) + 0.5) / 24)
    torch.testing.assert_close(loaded[10, 2:-2, 1], (torch.arange(2, 6) + 0.5) / 8)


def test_encodings_of_the_right_size_are_loaded_as_they_are():
    source, target = vit(256, 128), vit(256, 128)
    nn.init.normal_(source.pos_embed)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.pos_embed, target.pos_embed)


def released(prefix, **options):
    """Returns a ViT and its weights under the names of the release."""
    model = vit(256, 128, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    names = [
        ('patch_embed.projection.', 'patch_embed.proj.'),
        ('layers.0.ln1.', 'blocks.0.norm1.'),
        ('layers.0.ln2.', 'blocks.0.norm2.'),
        ('layers.0.ffn.layers.0.0.', 'blocks.0.mlp.fc1.'),
        ('layers.0.ffn.layers.1.', 'blocks.0.mlp.fc2.'),
        ('layers.0.attn.', 'blocks.0.attn.'),
        ('ln1.', 'norm.'),
    ]
    state = {}
    for name, value in model.state_dict().items():
        new = next((new + name.removeprefix(old) for old, new in names if name.startswith(old)), name)
        state[prefix + new] = value
    assert len(state) == len(model.state_dict())
    return model, state


def classifier(checkpoint, size):
    init_default_scope('mmpretrain')
    init = dict(type='Pretrained', checkpoint=str(checkpoint), prefix='backbone')
    options = dict(patch_size=16, interpolate_mode='bilinear', init_cfg=init)
    backbone = dict(type='ReIDVisionTransformer', arch=ARCH, img_size=size, **options)
    head = dict(type='BNNeckReIDHead', num_classes=3, in_channels=8)
    model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head))
    model.init_weights()
    return model


def test_a_pretrained_file_of_transreid_ssl_loads(tmp_path):
    """As DINO writes it: student, teacher, optimizer and the arguments of the run, which are pickled objects."""
    model, teacher = released('backbone.')
    teacher['head.mlp.0.weight'] = torch.ones(2, 2)
    content = dict(
        student={f'module.{key}': torch.zeros_like(value) for key, value in teacher.items()},
        teacher=teacher,
        epoch=100,
        args=argparse.Namespace(arch='vit_small', lr=0.1),
        optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
    )
    torch.save(content, tmp_path / 'lup.pth')
    run_tool('convert_checkpoint', 'transreid', tmp_path / 'lup.pth', tmp_path / 'converted.pth')
    loaded = classifier(tmp_path / 'converted.pth', (256, 128)).backbone.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    wide = classifier(tmp_path / 'converted.pth', (384, 128)).backbone
    assert wide.pos_embed.shape == (1, 24 * 8 + 1, 8) and torch.equal(wide.pos_embed[:, 0], model.pos_embed[:, 0])


def test_a_trained_model_of_transreid_loads_with_its_head(tmp_path):
    model, state = released('base.')
    neck = {f'bottleneck.{key}': value for key, value in nn.BatchNorm1d(8).state_dict().items()}
    neck['bottleneck.running_mean'] = torch.randn(8)
    state.update(neck, **{'classifier.weight': torch.randn(3, 8), 'base.fc.weight': torch.ones(10, 8)})
    torch.save(state, tmp_path / 'market.pth')
    (tmp_path / 'converted.pth').write_bytes(b'mine')
    command = ['transreid', tmp_path / 'market.pth', tmp_path / 'converted.pth']
    assert '--overwrite' in sentence('convert_checkpoint', *command)
    assert (tmp_path / 'converted.pth').read_bytes() == b'mine'
    run_tool('convert_checkpoint', *command, '--overwrite')
    target = classifier(tmp_path / 'converted.pth', (256, 128))
    file = torch.load(tmp_path / 'converted.pth', weights_only=True)['state_dict']
    target.load_state_dict(file, strict=True)
    assert torch.equal(target.head.bnneck.running_mean, neck['bottleneck.running_mean'])
    assert torch.equal(target.head.classifier.weight, state['classifier.weight'])
    assert torch.equal(target.backbone.layers[0].attn.qkv.weight, model.layers[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ({'backbone.patch_embed.conv.0.weight': torch.ones(1)}, ('patch_embed.conv.0.weight', 'ICS')),
        ({'base.sie_embed': torch.ones(1)}, ('sie_embed',)),
        ({'conv1.weight': torch.ones(1)}, ('conv1.weight',)),
        ({}, ('no ViT',)),
    ],
)
def test_another_architecture_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / 'other.pth')
    output = sentence('convert_checkpoint', 'transreid', tmp_path / 'other.pth', tmp_path / 'converted.pth')
    assert all(word in output for word in ('other.pth', *words)) and len(output.strip().splitlines()) == 1
    assert not (tmp_path / 'converted.pth').exists()


def test_the_names_are_registered_where_configs_look():
    assert DATA_SAMPLERS.get('PKSampler') is PKSampler
    for scope in ('mmpretrain', 'mmdet', 'mmseg'):
        init_default_scope(scope)
        with MODELS.switch_scope_and_registry(None) as registry:
            assert registry.get('BNNeckReIDHead') is BNNeckReIDHead


SWIN = dict(embed_dims=12, depths=[1, 1], num_heads=[1, 2])
BACKBONES = {
    'ViT': (dict(type='ReIDVisionTransformer', arch=ARCH, img_size=(64, 32), patch_size=16), 8),
    'Swin': (dict(type='SwinTransformer', arch=SWIN, img_size=(64, 32), window_size=4, out_indices=(1,)), 24),
    'ResNet': (dict(type='ResNet', depth=18, strides=(1, 2, 2, 1), base_channels=8, stem_channels=8), 64),
}


@pytest.mark.parametrize('kind', BACKBONES)
def test_backbones_train_and_are_fused_exactly_on_pictures_that_are_no_squares(kind):
    init_default_scope('mmpretrain')
    backbone, channels = BACKBONES[kind]
    neck = None if kind == 'ViT' else dict(type='GlobalAveragePooling')
    denoised = dict(type='DenoiseRepBackbone', backbone=backbone, image_size=(64, 32))
    head = dict(type='BNNeckReIDHead', num_classes=2, in_channels=channels)
    model = MODELS.build(dict(type='ImageClassifier', backbone=denoised, neck=neck, head=head))
    model.init_weights()
    images = torch.randn(4, 3, 64, 32)
    assert all(value.isfinite() for value in model.loss(images, samples([0, 0, 1, 1])).values())
    if kind == 'ResNet':
        assert model.backbone(images)[-1].shape[2:] == (4, 2), 'a sixteenth: its last stage has stride 1'
    randomise(model).double().eval()
    fused = fuse_model(model)
    assert not any('denoiser' in name for name in fused.state_dict())
    features = [torch.stack([s.pred_feature for s in m.predict(images.double())]) for m in (model, fused)]
    assert relative(*features) < 1e-9
    vanilla = MODELS.build(dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head)).double().eval()
    vanilla.load_state_dict(fused.state_dict(), strict=True)
    plain = {name: value for name, value in model.state_dict().items() if 'denoiser' not in name}
    vanilla.load_state_dict(plain, strict=True)
    without = torch.stack([s.pred_feature for s in vanilla.predict(images.double())])
    assert relative(without, features[0]) > 1e-3, 'the denoisers matter'

"""Re-identification: the head, the sampler, and ViTs that are no squares."""

import argparse
import math
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.runner import _SlicedDataset
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import DataLoader

from engine_helpers import message
from helpers import randomise, relative
from mmdenoiserep import fuse_model
from mmdenoiserep.core import InputError
from mmdenoiserep.models.reid_vit import source_grid
from mmdenoiserep.tasks.reid import BNNeckReIDHead, PKSampler, ReIDVisionTransformer, batch_hard_triplet_loss
from mmdenoiserep.tasks.reid_check_hook import check_batches, check_classes
from tiny_datasets import write_market1501
from tools_helpers import run_tool, sentence

# The triplet loss


def triplets(features, identities, margin):
    """The loss by its definition, one anchor after the other."""
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


# The head


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


def test_the_losses_see_the_feature_before_and_the_scores_after_the_neck():
    model = head(margin=0.3, triplet_weight=0.5)
    feature = torch.randn(6, 6)
    identities = torch.tensor([0, 0, 1, 1, 2, 2])
    losses = model.loss((torch.zeros(6, 1), feature), samples(identities.tolist()))
    scores = model.classifier(nn.functional.batch_norm(feature, None, None, model.bnneck.weight, training=True))
    assert losses.keys() == {'loss_id', 'loss_triplet'}
    torch.testing.assert_close(losses['loss_id'], nn.functional.cross_entropy(scores, identities))
    torch.testing.assert_close(losses['loss_triplet'], 0.5 * batch_hard_triplet_loss(feature, identities, 0.3))


def test_label_smoothing_and_other_losses_of_mmpretrain_can_be_the_identity_loss():
    model = head(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'))
    feature, identities = torch.randn(4, 6), torch.tensor([0, 0, 1, 2])
    loss = model.loss((feature,), samples(identities.tolist()))['loss_id']
    scores = model.classifier(nn.functional.batch_norm(feature, None, None, model.bnneck.weight, training=True))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(scores, identities, label_smoothing=0.1))


def test_what_is_compared_is_before_or_after_the_neck():
    feature = torch.randn(4, 6)
    before, after = head().eval(), head(test_feature='after').eval()
    after.bnneck.running_mean.normal_()
    expected = after.bnneck(feature)
    for model, value in ((before, feature), (after, expected)):
        given = samples([0, 1, 2, 0])
        predicted = model.predict((feature,), given)
        assert [id(p) for p in predicted] == [id(g) for g in given]
        assert torch.equal(torch.stack([p.pred_feature for p in predicted]), value)
        assert torch.equal(torch.stack([p.pred_feature for p in model.predict((feature,))]), value)
    assert not torch.equal(feature, expected)


@pytest.mark.parametrize(('options', 'word'), [(dict(test_feature='neck'), 'neck'), (dict(margin=-1.0), '-1.0')])
def test_wrong_options_of_the_head_are_named(options, word):
    with pytest.raises(InputError) as error:
        BNNeckReIDHead(3, 6, **options)
    assert word in message(error)


# The sampler


class Labels:
    """A data set of which only the identities matter: 7, 4, 2, 9 and 12 images."""

    sizes = (7, 4, 2, 9, 12)

    def get_gt_labels(self):
        return np.random.default_rng(3).permutation(np.repeat(np.arange(len(self.sizes)), self.sizes))

    def __len__(self):
        return sum(self.sizes)


def sampler(monkeypatch=None, rank=0, world=1, **options):
    if monkeypatch:
        monkeypatch.setattr('mmdenoiserep.datasets.pk_sampler.get_dist_info', lambda: (rank, world))
    options = {'num_ids': 3, 'num_instances': 4, 'seed': 1, **options}
    return DATA_SAMPLERS.build(dict(type='PKSampler', **options), default_args=dict(dataset=Labels()))


def batches(sampler, epoch=0):
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    size = sampler.num_ids * sampler.num_instances
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def test_every_batch_has_p_identities_with_k_images():
    labels = Labels().get_gt_labels()
    sampled = sampler()
    for epoch in range(5):
        drawn = batches(sampled, epoch)
        assert drawn
        for batch in drawn:
            assert list(Counter(labels[batch]).values()) == [4, 4, 4]
            for pid in set(labels[batch]):
                own = [i for i in batch if labels[i] == pid]
                assert len(set(own)) == 4 or Labels.sizes[pid] < 4, 'images repeat only where there are too few'


def test_a_pass_uses_no_image_twice_and_goes_on_until_too_few_identities_are_left():
    labels = Labels().get_gt_labels()
    groups = {pid: max(size // 4, 1) for pid, size in enumerate(Labels.sizes)}
    for number in range(20):
        used = np.concatenate(sampler()._one_pass(0, number))
        assert all(times == 1 for index, times in Counter(used.tolist()).items() if labels[index] != 2)
        taken = Counter(labels[used].tolist())
        assert sum(groups[pid] * 4 > taken[pid] for pid in groups) < 3


def test_the_order_depends_on_seed_and_epoch_alone():
    first = [batches(sampler(), epoch) for epoch in range(4)]
    assert first == [batches(sampler(), epoch) for epoch in range(4)]
    assert first[0] != first[1] and batches(sampler(seed=2)) != first[0]
    assert len({len(epoch) for epoch in first}) == 1, 'every epoch is of the same length'


def test_processes_share_the_batches_of_one_process(monkeypatch):
    for epoch in (0, 3):
        whole = batches(sampler(num_ids=2), epoch)
        parts = [batches(sampler(monkeypatch, rank, 2, num_ids=2), epoch) for rank in range(2)]
        monkeypatch.undo()
        dealt = [batch for pair in zip(*parts, strict=True) for batch in pair]
        assert dealt == whole[: len(dealt)] and len(whole) - len(dealt) < 2


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(num_ids=6), ('num_ids=6', 'only 5')),
        (dict(num_instances=0), ('num_instances', '0')),
        (dict(world=9), ('9 processes',)),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, words, monkeypatch):
    with pytest.raises(InputError) as error:
        sampler(monkeypatch, **options)
    assert all(word in message(error) for word in words)


def test_a_data_set_without_labels_is_refused():
    with pytest.raises(InputError, match='PKSampler needs .* range lacks'):
        PKSampler(range(9))


# The check before a training


def loader(batch_size, **options):
    return DataLoader(range(34), batch_size, sampler=sampler(**options))


@pytest.mark.parametrize('batch_size', [4, 11, 13, 24])
def test_batches_that_the_sampler_does_not_fill_are_refused(batch_size):
    check_batches(loader(12))
    with pytest.raises(InputError) as error:
        check_batches(loader(batch_size))
    assert f'batch_size of train_dataloader is {batch_size}' in message(error) and '12 images' in message(error)


def test_batches_are_those_of_a_process(monkeypatch):
    check_batches(loader(8, monkeypatch=monkeypatch, world=2, num_ids=2))
    with pytest.raises(InputError, match='16.* 8 images for each process'):
        check_batches(loader(16, monkeypatch=monkeypatch, world=2, num_ids=2))


def test_loaders_of_others_are_not_asked():
    check_batches(DataLoader(range(34), 5))
    check_batches(DataLoader(range(34), None))


@pytest.mark.parametrize('kind', ['BNNeckReIDHead', 'LinearClsHead', 'ArcFaceClsHead'])
@pytest.mark.parametrize('wrapper', [None, 'RepeatDataset', 'ConcatDataset'])
def test_heads_with_fewer_classes_than_identities_are_refused(wrapper, kind, tmp_path):
    write_market1501(tmp_path)
    market = dict(type='Market1501', data_root=str(tmp_path), split='train')
    wrapped = dict(
        RepeatDataset=dict(type='RepeatDataset', times=2, dataset=market),
        ConcatDataset=dict(type='ConcatDataset', datasets=[market]),
    )
    init_default_scope('mmpretrain')
    dataset = DATASETS.build(wrapped.get(wrapper, market))
    loaders = [DataLoader(dataset, 4)] + ([loader(12), DataLoader(dataset, None)] if wrapper is None else [])
    model = nn.Module()
    for classes in (5, 7, 4):
        model.head = MODELS.build(dict(type=kind, num_classes=classes, in_channels=4))
        for each in loaders:
            if classes >= 5:
                check_classes(each, model)
                continue
            with pytest.raises(InputError) as error:
                check_classes(each, model)
            assert 'num_classes of the head is 4' in message(error) and '5 identities' in message(error)


def test_models_and_data_of_other_kinds_are_not_asked():
    class Unlabelled:
        def get_gt_labels(self):
            raise KeyError('gt_label')

        def __len__(self):
            return 3

    model = nn.Module()
    check_classes(loader(12), model)
    model.head = MODELS.build(dict(type='mmpretrain.LinearClsHead', num_classes=2, in_channels=4))
    check_classes(DataLoader(Unlabelled(), 2), model)


@pytest.mark.parametrize('wrapper', [None, 'RepeatDataset', 'KFoldDataset'])
def test_the_head_of_re_identification_is_checked_against_any_labels(wrapper, tmp_path):
    for i in range(6):
        (tmp_path / f'{i % 3}').mkdir(exist_ok=True)
        (tmp_path / f'{i % 3}/{i}.png').touch()
    init_default_scope('mmpretrain')
    data = dict(type='CustomDataset', data_root=str(tmp_path))
    options = dict(RepeatDataset=dict(times=2), KFoldDataset=dict(num_splits=2, fold=0))
    dataset = DATASETS.build(dict(type=wrapper, dataset=data, **options[wrapper]) if wrapper else data)
    model = nn.Module()
    for classes in (4, 3):
        model.head = MODELS.build(dict(type='BNNeckReIDHead', num_classes=classes, in_channels=4))
        check_classes(DataLoader(dataset, 4), model)
    model.head = MODELS.build(dict(type='BNNeckReIDHead', num_classes=2, in_channels=4))
    with pytest.raises(InputError, match='num_classes of the head is 2.* 3 identities'):
        check_classes(DataLoader(dataset, 4), model)


def test_a_training_is_refused_before_its_first_iteration(tmp_path):
    write_market1501(tmp_path / 'market')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(16, 32)), dict(type='PackInputs')]
    backbone = dict(type='ReIDVisionTransformer', img_size=(32, 16), patch_size=8, arch=ARCH)
    head = dict(type='BNNeckReIDHead', num_classes=5, in_channels=8)
    init_default_scope('mmpretrain')

    def train(batch_size=4, num_classes=5):
        runner = Runner(
            model=dict(type='ImageClassifier', backbone=backbone, head=head | dict(num_classes=num_classes)),
            work_dir=str(tmp_path),
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=0,
                sampler=dict(type='PKSampler', num_ids=2, num_instances=2),
                dataset=dict(type='Market1501', data_root=str(tmp_path / 'market'), split='train', pipeline=pipeline),
            ),
            train_cfg=dict(by_epoch=False, max_iters=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            default_hooks=dict(check=dict(type='ReIDCheckHook'), checkpoint=None, logger=None),
            experiment_name=f'check_{batch_size}_{num_classes}',
            default_scope='mmpretrain',
            log_level='ERROR',
        )
        runner.train()
        return runner.iter

    assert train() == 1
    for wrong, word in (dict(batch_size=8), 'batch_size'), (dict(num_classes=4), 'num_classes'):
        with pytest.raises(InputError, match=word):
            train(**wrong)


def test_a_part_of_the_data_is_sampled_with_num_batch_per_epoch():
    """mmengine hands the sampler a slice of all images: an epoch has so many batches, of any identities."""
    labels = Labels()
    options = dict(type='PKSampler', num_ids=2, num_instances=2, seed=0)
    whole, short = (
        list(DATA_SAMPLERS.build(options, default_args=dict(dataset=dataset)))
        for dataset in (labels, _SlicedDataset(labels, 3 * 4))
    )
    assert short == whole[: 3 * 4] and max(short) >= 3 * 4 and len(whole) > len(short)


# Position encodings


ARCH = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=16)


def vit(height, width, **options):
    return ReIDVisionTransformer(ARCH, img_size=(height, width), patch_size=16, interpolate_mode='bilinear', **options)


@pytest.mark.parametrize(
    ('tokens', 'target', 'grid'),
    [(196, (16, 8), (14, 14)), (128, (24, 8), (16, 8)), (128, (8, 16), (8, 16)), (210, (16, 8), (21, 10))],
)
def test_the_grid_of_a_checkpoint(tokens, target, grid):
    assert source_grid(tokens, target) == grid


def test_a_grid_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError) as error:
        source_grid(127, (16, 8))
    assert '127' in message(error) and '16 x 8' in message(error)


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


# Released weights


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
    backbone = dict(
        type='ReIDVisionTransformer',
        arch=ARCH,
        img_size=size,
        patch_size=16,
        interpolate_mode='bilinear',
        init_cfg=init,
    )
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
    run_tool('convert_checkpoint', 'transreid', tmp_path / 'market.pth', tmp_path / 'converted.pth')
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


def test_an_output_that_exists_is_kept(tmp_path):
    torch.save(released('base.')[1], tmp_path / 'in.pth')
    (tmp_path / 'out.pth').write_bytes(b'mine')
    assert '--overwrite' in sentence('convert_checkpoint', 'transreid', tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert (tmp_path / 'out.pth').read_bytes() == b'mine'
    run_tool('convert_checkpoint', 'transreid', tmp_path / 'in.pth', tmp_path / 'out.pth', '--overwrite')


def test_the_names_are_registered_where_configs_look():
    assert DATA_SAMPLERS.get('PKSampler') is PKSampler
    for scope in ('mmpretrain', 'mmdet', 'mmseg'):
        init_default_scope(scope)
        with MODELS.switch_scope_and_registry(None) as registry:
            assert registry.get('BNNeckReIDHead') is BNNeckReIDHead


# Backbones


BACKBONES = {
    'ViT': (
        dict(type='ReIDVisionTransformer', arch=ARCH, img_size=(64, 32), patch_size=16),
        None,
        8,
    ),
    'Swin': (
        dict(
            type='SwinTransformer',
            arch=dict(embed_dims=12, depths=[1, 1], num_heads=[1, 2]),
            img_size=(64, 32),
            window_size=4,
            out_indices=(1,),
        ),
        dict(type='GlobalAveragePooling'),
        24,
    ),
    'ResNet, last stage with stride 1': (
        dict(type='ResNet', depth=18, strides=(1, 2, 2, 1), base_channels=8, stem_channels=8),
        dict(type='GlobalAveragePooling'),
        64,
    ),
}


@pytest.mark.parametrize('kind', BACKBONES)
def test_backbones_train_and_are_fused_exactly_on_pictures_that_are_no_squares(kind):
    init_default_scope('mmpretrain')
    backbone, neck, channels = BACKBONES[kind]
    denoised = dict(type='DenoiseRepBackbone', backbone=backbone, image_size=(64, 32))
    head = dict(type='BNNeckReIDHead', num_classes=2, in_channels=channels)
    model = MODELS.build(dict(type='ImageClassifier', backbone=denoised, neck=neck, head=head))
    model.init_weights()
    images = torch.randn(4, 3, 64, 32)
    assert all(value.isfinite() for value in model.loss(images, samples([0, 0, 1, 1])).values())
    if kind.startswith('ResNet'):
        assert model.backbone(images)[-1].shape[2:] == (4, 2), 'a sixteenth, not a thirty-second'
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

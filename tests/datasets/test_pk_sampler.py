"""Batches of P identities with K images, and the check of them before a training."""

from collections import Counter

import numpy as np
import pytest
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.runner import _SlicedDataset
from torch import nn
from torch.utils.data import DataLoader

from engine_helpers import message
from mmdenoiserep.core import InputError
from mmdenoiserep.tasks.reid import PKSampler
from mmdenoiserep.tasks.reid_check_hook import check_batches, check_classes
from tiny_datasets import write_market1501

ARCH = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=16)


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
    with pytest.raises(InputError, match='PKSampler needs .* range lacks'):
        PKSampler(range(9))


def test_a_part_of_the_data_is_sampled_with_num_batch_per_epoch():
    """mmengine hands the sampler a slice of all images: an epoch has so many batches, of any identities."""
    labels = Labels()
    options = dict(type='PKSampler', num_ids=2, num_instances=2, seed=0)
    whole, short = (
        list(DATA_SAMPLERS.build(options, default_args=dict(dataset=dataset)))
        for dataset in (labels, _SlicedDataset(labels, 3 * 4))
    )
    assert short == whole[: 3 * 4] and max(short) >= 3 * 4 and len(whole) > len(short)


def loader(batch_size, **options):
    return DataLoader(range(34), batch_size, sampler=sampler(**options))


@pytest.mark.parametrize(('batch_size', 'world'), [(4, 1), (11, 1), (13, 1), (24, 1), (16, 2)])
def test_batches_that_the_sampler_does_not_fill_are_refused(batch_size, world, monkeypatch):
    """A part, one image too few or too many, two of them, and the batch of all processes together."""
    options = dict(monkeypatch=monkeypatch, world=world, num_ids=2 if world > 1 else 3)
    whole = options['num_ids'] * 4
    check_batches(loader(whole, **options))
    with pytest.raises(InputError) as error:
        check_batches(loader(batch_size, **options))
    assert f'batch_size of train_dataloader is {batch_size}' in message(error) and f'{whole} images' in message(error)
    assert world == 1 or 'for each process' in message(error)


@pytest.mark.parametrize('kind', ['BNNeckReIDHead', 'LinearClsHead', 'ArcFaceClsHead'])
@pytest.mark.parametrize('wrapper', [None, 'RepeatDataset', 'ConcatDataset'])
def test_heads_with_fewer_classes_than_identities_are_refused(wrapper, kind, tmp_path):
    write_market1501(tmp_path)
    market = dict(type='Market1501', data_root=str(tmp_path), split='train')
    options = dict(RepeatDataset=dict(times=2, dataset=market), ConcatDataset=dict(datasets=[market]))
    init_default_scope('mmpretrain')
    dataset = DATASETS.build(dict(type=wrapper, **options[wrapper]) if wrapper else market)
    model = nn.Module()
    for each in [DataLoader(dataset, 4)] + ([loader(12), DataLoader(dataset, None)] if wrapper is None else []):
        for classes in (5, 7):
            model.head = MODELS.build(dict(type=kind, num_classes=classes, in_channels=4))
            check_classes(each, model)
        model.head = MODELS.build(dict(type=kind, num_classes=4, in_channels=4))
        with pytest.raises(InputError) as error:
            check_classes(each, model)
        assert 'num_classes of the head is 4' in message(error) and '5 identities' in message(error)


def test_models_and_data_of_other_kinds_are_not_asked():
    class Unlabelled:
        def get_gt_labels(self):
            raise KeyError('gt_label')

        def __len__(self):
            return 3

    check_batches(DataLoader(range(34), 5))
    check_batches(DataLoader(range(34), None))
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

"""The five data sets of re-identification, read from small trees in the layouts of their archives."""

import copy
import gc
import os
import pickle
import shutil
import sys

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from mmengine.registry import DATASETS, init_default_scope
from torch.utils.data import DataLoader

from engine_helpers import message
from mmdenoiserep.core import InputError
from mmdenoiserep.datasets import reid_datasets as datasets
from mmdenoiserep.datasets.reid_datasets import CUHK03, MSMT17, DukeMTMCReID, Market1501, VehicleID
from mmdenoiserep.tasks.reid import PKSampler
from tiny_datasets import PEOPLE, VEHICLES, WRITERS, cuhk03_image, sightings

FOLDERS = {
    Market1501: 'data/market1501',
    DukeMTMCReID: 'data/dukemtmcreid',
    MSMT17: 'data/MSMT17',
    CUHK03: 'data/cuhk03',
    VehicleID: 'data/VehicleID_V1.0',
}
WITH_QUERIES = [kind for kind in FOLDERS if kind is not VehicleID]


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """mmengine collects garbage after loading, which takes far longer than all else here."""
    monkeypatch.setattr(gc, 'collect', lambda: 0)


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """The five trees in a folder whose name is not ASCII; tests that change something copy them."""
    root = tmp_path_factory.mktemp('réidentification-再识别')
    for folder in FOLDERS.values():
        WRITERS[folder](root / folder)
    return root


@pytest.fixture
def tree(originals, tmp_path):
    """Returns a function that copies the tree of a class to ``data`` or a folder below and returns its path."""

    def make(kind, below=''):
        shutil.copytree(originals / FOLDERS[kind], tmp_path / 'data' / below)
        return tmp_path / 'data'

    return make


def samples(dataset):
    """Returns what a data set knows of its images, without loading them."""
    return [dataset.get_data_info(i) for i in range(len(dataset))]


def seen(dataset):
    return sorted((sample['pid'], sample['camid']) for sample in samples(dataset))


def expected(kind, part):
    """Returns what :func:`seen` should: cameras from 0, MSMT17's identities from 0, two cameras in CUHK-03."""
    pids = {pid: new if kind is MSMT17 else pid for new, pid in enumerate(sorted(PEOPLE[part]))}
    last = 2 if kind is CUHK03 else 3
    pairs = [(pids[pid], min(camera, last) - 1) for _, pid, camera in sightings(part)]
    if part == 'gallery':
        pairs += {Market1501: [(0, 0), (0, 2)], DukeMTMCReID: [(7139, 7)]}.get(kind, [])
    return sorted(pairs)


# Splits


@pytest.mark.parametrize('slash', ['', '/'])
@pytest.mark.parametrize('kind', WITH_QUERIES)
def test_identities_and_cameras_of_every_split(kind, slash, originals):
    for split in PEOPLE:
        dataset = kind(str(originals / FOLDERS[kind]) + slash, split)
        assert seen(dataset) == expected(kind, split)
        for sample in samples(dataset):
            assert type(sample['pid']) is type(sample['camid']) is int
            assert sample['is_query'] is (split == 'query')
            assert ('gt_label' in sample) == (split == 'train')
        assert dataset.CLASSES is None and dataset.test_mode == (split != 'train')


@pytest.mark.parametrize('kind', [Market1501, DukeMTMCReID, MSMT17, VehicleID])
def test_images_are_those_that_were_named(kind, originals):
    for split in kind.PARTS:
        for sample in samples(kind(str(originals / FOLDERS[kind]), split)):
            name = os.path.basename(sample['img_path'])
            assert os.path.isfile(sample['img_path']), 'and OpenMMLab opens str, not Path'
            written = int(name[:7]) // 10 if kind is VehicleID else int(name[:4])
            assert sample['pid'] == written


@pytest.mark.parametrize('kind', WITH_QUERIES)
def test_test_is_the_queries_and_then_the_gallery(kind, originals):
    root = str(originals / FOLDERS[kind])
    query, gallery, test = (samples(kind(root, split)) for split in ('query', 'gallery', 'test'))
    for index, sample in enumerate(query + gallery):
        assert {**sample, 'sample_idx': index} == test[index]
    assert len(test) == len(query) + len(gallery)


@pytest.mark.parametrize('kind', FOLDERS)
def test_training_labels_count_the_identities_in_order(kind, originals):
    train = kind(str(originals / FOLDERS[kind]), 'train')
    pids = sorted({sample['pid'] for sample in samples(train)})
    assert [pids[sample['gt_label']] for sample in samples(train)] == [sample['pid'] for sample in samples(train)]
    assert set(train.get_gt_labels()) == set(range(5))


@pytest.mark.parametrize('kind', FOLDERS)
def test_the_sampler_finds_four_images_each_of_four_identities(kind, originals):
    train = kind(str(originals / FOLDERS[kind]), 'train')
    labels = train.get_gt_labels()
    batch = labels[list(PKSampler(train, num_ids=4, num_instances=4, seed=0))[:16]]
    assert sorted(np.unique(batch, return_counts=True)[1]) == [4, 4, 4, 4]


@pytest.mark.parametrize('kind', [MSMT17, VehicleID])
def test_lists_keep_their_order_and_training_joins_them(kind, originals):
    folder = originals / FOLDERS[kind]
    names = {MSMT17: ('list_train.txt', 'list_val.txt'), VehicleID: ('train_test_split/train_list.txt',)}[kind]
    lines = [line.split() for name in names for line in (folder / name).read_text().splitlines()]
    listed = [(name.removesuffix('.jpg'), int(pid)) for name, pid in lines]
    prefix = f'{folder}/{"train" if kind is MSMT17 else "image"}/'
    for options in [{}] if kind is MSMT17 else [dict(size=size) for size in VehicleID.SIZES]:
        found = samples(kind(folder, 'train', **options))
        assert [(s['img_path'].removeprefix(prefix).removesuffix('.jpg'), s['pid']) for s in found] == listed
    assert kind is MSMT17 or {pid for _, pid in listed} == set(VEHICLES['train'])


@pytest.mark.parametrize('size', [800, 1600, 2400])
def test_vehicleid_has_neither_cameras_nor_fixed_queries(size, originals):
    dataset = VehicleID(str(originals / FOLDERS[VehicleID]), 'test', size=size)
    assert {sample['pid'] for sample in samples(dataset)} == set(VEHICLES[size])
    assert len(dataset) == sum(1 if pid == 40 else 4 for pid in VEHICLES[size])
    assert {(sample['camid'], sample['is_query']) for sample in samples(dataset)} == {(0, False)}


def test_configs_of_mmpretrain_build_them_by_name(originals):
    init_default_scope('mmpretrain')
    for kind, folder in FOLDERS.items():
        pipeline = [dict(type='PackInputs', meta_keys=('img_path', 'pid', 'camid', 'is_query'))]
        if kind is not CUHK03:
            pipeline.insert(0, dict(type='LoadImageFromFile'))
        config = dict(type=kind.__name__, data_root=str(originals / folder), split='test', pipeline=pipeline)
        dataset = DATASETS.build(config)
        for sample, packed in zip(samples(dataset), dataset, strict=True):
            assert packed['inputs'].shape[0] == 3
            assert {key: sample[key] for key in pipeline[-1]['meta_keys']} == packed['data_samples'].to_dict()


# Layouts


@pytest.mark.parametrize(
    ('kind', 'wrapper'),
    [
        (Market1501, 'Market-1501-v15.09.15'),
        (DukeMTMCReID, 'DukeMTMC-reID'),
        (MSMT17, 'MSMT17_V1'),
        (MSMT17, 'MSMT17_V2'),
        (VehicleID, 'VehicleID_V1.0'),
    ],
)
def test_the_folder_of_the_archive_may_be_there(kind, wrapper, tree):
    root = tree(kind, wrapper)
    for split in kind.PARTS:
        outside, inside = kind(str(root), split), kind(str(root / wrapper), split)
        assert samples(outside) == samples(inside) and len(outside) > 0
    if kind is Market1501:  # half unpacked, it is not passed over
        shutil.rmtree(root / wrapper / 'query')
        with pytest.raises(InputError, match=f'/{wrapper} lacks query, expected: '):
            kind(str(root), 'test')


def test_cuhk03_may_lie_beside_the_protocol(tree, originals):
    root = tree(CUHK03)
    (root / 'cuhk03_release/cuhk-03.mat').rename(root / 'cuhk-03.mat')
    moved, whole = (CUHK03(str(folder), 'test') for folder in (root, originals / FOLDERS[CUHK03]))
    assert samples(moved) == samples(whole) and (moved[0]['img'] == whole[0]['img']).all()


@pytest.mark.parametrize('wrapper', ['', 'MSMT17_V2'])
def test_msmt17_version_2(wrapper, tree, originals):
    root = tree(MSMT17, wrapper)
    for side in ('train', 'test'):
        (root / wrapper / side).rename(root / wrapper / f'mask_{side}_v2')
    for split in MSMT17.PARTS:
        first, second = MSMT17(str(originals / FOLDERS[MSMT17]), split), MSMT17(str(root), split)
        assert seen(first) == seen(second)
        assert all('/mask_t' in sample['img_path'] for sample in samples(second))


@pytest.mark.parametrize(
    ('kind', 'split', 'part'),
    [
        (Market1501, 'train', 'bounding_box_train'),
        (Market1501, 'train', ''),
        (Market1501, 'test', 'query'),
        (Market1501, 'test', 'bounding_box_test'),
        (DukeMTMCReID, 'gallery', 'bounding_box_test'),
        (MSMT17, 'train', 'train'),
        (MSMT17, 'query', 'test'),
        (MSMT17, 'train', 'list_val.txt'),
        (MSMT17, 'test', 'list_gallery.txt'),
        (CUHK03, 'train', 'cuhk03_release/cuhk-03.mat'),
        (CUHK03, 'test', 'cuhk03_new_protocol_config_labeled.mat'),
        (VehicleID, 'train', 'image'),
        (VehicleID, 'test', 'train_test_split/test_list_800.txt'),
    ],
)
def test_a_missing_part_is_named_with_the_layout(kind, split, part, tree):
    root = tree(kind)
    shutil.rmtree(root / part) if (root / part).is_dir() else (root / part).unlink()
    with pytest.raises(InputError) as error:
        kind(str(root), split)
    lacks = part or 'bounding_box_train'
    assert message(error).startswith(f'{root} lacks {lacks}') and message(error).endswith(f'expected: {kind.LAYOUT}')


@pytest.mark.parametrize(('kind', 'part'), [(Market1501, 'query'), (MSMT17, 'list_query.txt')])
def test_a_part_without_images(kind, part, tree):
    root = tree(kind)
    if kind is MSMT17:
        (root / part).write_text('\n')
    else:
        shutil.rmtree(root / part)
        (root / part).mkdir()
    with pytest.raises(InputError, match='/data has no images for query, expected: '):
        kind(str(root), 'test')


@pytest.mark.parametrize(('kind', 'folder'), [(MSMT17, 'test/0001'), (VehicleID, 'image')])
def test_listed_images_that_are_missing(kind, folder, tree):
    root = tree(kind)
    test = samples(kind(str(root), 'test'))
    os.unlink(min(sample['img_path'] for sample in test if sample['img_path'].startswith(str(root / folder))))
    with pytest.raises(InputError, match=r'(?s)^\S+\.jpg is missing \(1 of the \d+ images in .*\): unpack'):
        kind(str(root), 'test')
    shutil.rmtree(root / folder)
    (root / folder.split('/')[0]).mkdir(exist_ok=True)
    with pytest.raises(InputError, match=r'is missing \([1-9]\d* of the \d+ images'):
        kind(str(root), 'test')


def test_looking_for_images_reads_each_folder_once(originals, monkeypatch):
    """The folder of VehicleID has two hundred thousand names."""
    read = []
    listdir = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda folder: read.append(folder) or listdir(folder))
    VehicleID(str(originals / FOLDERS[VehicleID]), 'train')
    MSMT17(str(originals / FOLDERS[MSMT17]), 'query')
    assert len(read) == len(set(read)) == 1 + len(PEOPLE['query'])


@pytest.mark.parametrize(
    ('kind', 'file'),
    [
        (Market1501, 'query/0001_s1_000451_03.jpg'),
        (Market1501, 'query/0001_c0s1_000451_03.jpg'),
        (Market1501, 'query/-2_c1s1_000451_03.jpg'),
        (Market1501, 'query/holiday.jpg'),
        (DukeMTMCReID, 'query/0001_c1s1_000451_03.jpg'),
        (DukeMTMCReID, 'query/-1_c1_f0000001.jpg'),
    ],
)
def test_an_image_with_another_name_is_named(kind, file, tree):
    root = tree(kind)
    (root / file).write_bytes(b'')
    with pytest.raises(InputError, match='does not fit the grammar') as error:
        kind(str(root), 'test')
    assert str(root / file) in str(error.value)


@pytest.mark.parametrize('kind', [Market1501, DukeMTMCReID])
def test_images_of_all_suffixes_and_behind_links_count_and_the_rest_is_named(kind, tree, monkeypatch):
    """As own data come: from several converters, through a Mac and a notebook, with links to another disk."""
    root = tree(kind)
    before = seen(kind(str(root), 'gallery'))
    folder = root / 'bounding_box_test'
    elsewhere = root / 'elsewhere'
    elsewhere.mkdir()
    paths = sorted(folder.glob('*.jpg'))
    for path, suffix in zip(paths, ('.JPG', '.png', '.jpeg', '.PNG', '.bmp', '.Tif', '.webp'), strict=False):
        path.rename(path.with_suffix(suffix))
    linked = sorted(folder.glob('*.jpg'))[0]
    linked.rename(elsewhere / 'image')
    linked.symlink_to(elsewhere / 'image')
    for name in (f'._{linked.name}', '.DS_Store', 'readme.txt', paths[0].stem, 'image.jpg.part'):
        (folder / name).write_bytes(b'')
    (folder / '.ipynb_checkpoints').mkdir()
    (folder / '0009').mkdir()
    logged = []
    monkeypatch.setattr(datasets, 'print_log', lambda line, *rest, **more: logged.append(line))
    assert seen(kind(str(root), 'gallery')) == before
    extra = 1 if kind is Market1501 else 0  # Thumbs.db
    assert f'{7 + extra} left out' in logged[0] and f'._{linked.name}' in logged[0]
    # the same picture under two suffixes counts twice, and the log warns of it
    (folder / f'{linked.stem}.png').write_bytes(b'')
    assert len(seen(kind(str(root), 'gallery'))) == len(before) + 1
    assert any('2 images have the name of another' in line for line in logged)


@pytest.mark.parametrize('kind', [Market1501, DukeMTMCReID])
def test_a_link_to_nothing_is_no_image_that_is_passed_over(kind, tree):
    root = tree(kind)
    path = sorted((root / 'query').glob('*.jpg'))[0]
    path.unlink()
    path.symlink_to(root / 'gone')
    with pytest.raises(InputError, match='is a link to nothing') as error:
        kind(str(root), 'query')
    assert str(path) in str(error.value)


@pytest.mark.parametrize('kind, name', [(Market1501, '0001_c12s1_000451_03.png'), (DukeMTMCReID, '0001_c10_f01.JPG')])
def test_more_than_nine_cameras(kind, name, tree):
    root = tree(kind)
    (root / 'query' / name).write_bytes(b'')
    assert (1, 11 if kind is Market1501 else 9) in seen(kind(str(root), 'query'))


def test_lists_name_images_of_other_suffixes_too(tree):
    root = tree(VehicleID)
    before = samples(VehicleID(str(root), 'train'))
    for i, sample in enumerate(before[:2]):
        os.rename(sample['img_path'], sample['img_path'].replace('.jpg', ('.png', '.JPEG')[i]))
    after = samples(VehicleID(str(root), 'train'))
    assert [s['pid'] for s in after] == [s['pid'] for s in before]
    assert [os.path.isfile(s['img_path']) for s in after] == [True] * len(before)


def test_msmt17_with_other_suffixes(tree):
    root = tree(MSMT17)
    before = seen(MSMT17(str(root), 'query'))
    text = (root / 'list_query.txt').read_text()
    first = text.split()[0]
    os.rename(root / 'test' / first, root / 'test' / first.replace('.jpg', '.png'))
    (root / 'list_query.txt').write_text(text.replace(first, first.replace('.jpg', '.png')))
    assert seen(MSMT17(str(root), 'query')) == before


@pytest.mark.parametrize(
    ('kind', 'file', 'line'),
    [
        (MSMT17, 'list_query.txt', '0000/0000_000_01_0303morning_0015_0.jpg'),
        (MSMT17, 'list_query.txt', '0000/0000_000_00_0303morning_0015_0.jpg 0'),
        (MSMT17, 'list_query.txt', '0000/0000_000_one_0303morning_0015_0.jpg 0'),
        (VehicleID, 'train_test_split/test_list_800.txt', '0000001 car'),
        (VehicleID, 'train_test_split/test_list_800.txt', '0000001'),
    ],
)
def test_a_line_that_does_not_fit_is_named(kind, file, line, tree):
    root = tree(kind)
    lines = (root / file).read_text().splitlines()
    (root / file).write_text('\n'.join([lines[0], '', line, *lines[1:]]))
    with pytest.raises(InputError, match='does not fit the grammar') as error:
        kind(str(root), 'test')
    assert str(error.value).startswith(f'line 3 of {root / file}, {line!r},')


@pytest.mark.parametrize(
    ('kind', 'arguments', 'expected'),
    [
        (Market1501, dict(split='val'), "split of Market1501 must be one of train, query, gallery, test, got 'val'"),
        (VehicleID, dict(split='query'), "split of VehicleID must be one of train, test, got 'query'"),
        (VehicleID, dict(split='test', size=3200), 'size of VehicleID must be one of 800, 1600, 2400, got 3200'),
        (CUHK03, dict(split='test', style='l'), "style of CUHK03 must be one of labeled, detected, got 'l'"),
    ],
)
def test_unknown_arguments(kind, arguments, expected, originals):
    with pytest.raises(InputError, match=f'^{expected}$'):
        kind(str(originals / FOLDERS[kind]), **arguments)


# Statistics


MARKET_LOG = [
    'Market1501 query: 1 left out that are no images: Thumbs.db',
    'Market1501 query: 3 identities, 4 images, 3 cameras (published: 750 identities, 3,368 images)',
    'Market1501 gallery: 1 left out that are no images: Thumbs.db',
    'Market1501 gallery: 4 identities, 10 images, 3 cameras (published: 751 identities, 15,913 images)',
]
CUHK03_LOG = 'CUHK03 detected train: 5 identities, 18 images, 2 cameras (published: 767 identities, 7,365 images)'
VEHICLE_LOG = 'VehicleID test 1600: 4 identities, 16 images (published: 1,600 identities, 13,377 images)'


@pytest.mark.parametrize(
    ('kind', 'arguments', 'lines'),
    [
        (Market1501, dict(split='test'), MARKET_LOG),
        (CUHK03, dict(split='train', style='detected'), [CUHK03_LOG]),
        (VehicleID, dict(split='train'), ['VehicleID train: 5 identities, 20 images']),
        (VehicleID, dict(split='test', size=1600), [VEHICLE_LOG]),
    ],
)
def test_the_log_says_what_was_found_and_what_was_not_taken(kind, arguments, lines, originals, monkeypatch):
    logged = []
    monkeypatch.setattr(datasets, 'print_log', lambda line, logger: logged.append((line, logger)))
    kind(str(originals / FOLDERS[kind]), **arguments)
    assert logged == [(line, 'current') for line in lines]


def test_published_figures_belong_to_parts_that_exist(originals, monkeypatch):
    logged = []
    monkeypatch.setattr(datasets, 'print_log', lambda line, logger: logged.append(line))
    for kind, folder in FOLDERS.items():
        for variant in {CUHK03: CUHK03.STYLES, VehicleID: VehicleID.SIZES}.get(kind, [None]):
            more = {} if variant is None else {'style' if kind is CUHK03 else 'size': variant}
            for split in kind.PARTS:
                kind(str(originals / folder), split, **more)
        for name, figures in kind.PUBLISHED.items():
            start = f'{kind.__name__} {name}: '
            assert any(line.startswith(start) and line.endswith(f'(published: {figures})') for line in logged)


# CUHK-03


@pytest.mark.parametrize('style', ['labeled', 'detected'])
def test_cuhk03_reads_the_pixels_that_were_written(style, originals):
    for split in ('train', 'test'):
        dataset = CUHK03(str(originals / FOLDERS[CUHK03]), split, style=style)
        assert split == 'test' or len(dataset) == len(sightings('train')) - (style == 'detected')
        for index, sample in enumerate(dataset):
            written = cuhk03_image(style, sample['img_path'])
            np.testing.assert_array_equal(sample['img'], cv2.cvtColor(written, cv2.COLOR_RGB2BGR))
            assert sample['img'].dtype == np.uint8 and sample['img'].flags.c_contiguous
            assert sample['ori_shape'] == sample['img_shape'] == written.shape[:2]
            assert sample['sample_idx'] == index


def plain(batch):
    """Collates without stacking, since images differ in size."""
    return [(item['img_path'], item['img']) for item in batch]


def test_cuhk03_in_two_workers_while_the_file_is_open_here(originals):
    dataset = CUHK03(str(originals / FOLDERS[CUHK03]), 'test')
    here = plain(dataset)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=plain, multiprocessing_context='fork')
    for _ in range(2):
        there = [item for batch in loader for item in batch]
        assert [name for name, _ in there] == [name for name, _ in here]
        assert all((a == b).all() for (_, a), (_, b) in zip(there, here, strict=True))


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d)), lambda d: d.get_subset(list(range(len(d))))]
)
def test_cuhk03_can_be_copied_and_sent_to_another_process(duplicate, originals):
    dataset = CUHK03(str(originals / FOLDERS[CUHK03]), 'test')
    first = dataset[0]
    twin = duplicate(dataset)
    assert len(twin) == len(dataset)
    assert twin[0]['img_path'] == first['img_path'] and (twin[0]['img'] == first['img']).all()


def test_cuhk03_opens_its_file_once_a_process(tree, monkeypatch):
    opened = []
    file = h5py.File
    monkeypatch.setattr(h5py, 'File', lambda *args: opened.append(args) or file(*args))
    root = str(tree(CUHK03))
    dataset = CUHK03(root, 'train')
    for sample in [*dataset, *CUHK03(root, 'test')]:
        assert sample['img'].ndim == 3
    assert len(opened) == 1
    count = DataLoader(dataset, num_workers=1, collate_fn=lambda batch: len(opened), multiprocessing_context='fork')
    assert set(count) == {2}, 'a worker knows of the one here and opens its own'


def change_protocol(root, **changes):
    path = root / PROTOCOL
    protocol = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith('__')} | changes
    scipy.io.savemat(path, {key: value for key, value in protocol.items() if value is not None})


def without_labeled(root):
    with h5py.File(root / PIXELS, 'r+') as file:
        del file['labeled']


def listing(name):
    return np.array([[name]] * 31, object)


PIXELS, PROTOCOL = 'cuhk03_release/cuhk-03.mat', 'cuhk03_new_protocol_config_labeled.mat'
DAMAGED = 'cuhk-03.mat is damaged or not the cuhk-03.mat of CUHK-03: '
NO_PROTOCOL = r'config_labeled.mat is damaged or not a protocol of CUHK-03 \('


@pytest.mark.parametrize(
    ('spoil', 'expected'),
    [
        (lambda root: (root / PIXELS).write_bytes(b'MATLAB 5.0 MAT-file'), DAMAGED),
        (lambda root: (root / PIXELS).write_bytes((root / PIXELS).read_bytes()[:-1000]), DAMAGED),
        (without_labeled, DAMAGED),
        (lambda root: (root / PROTOCOL).write_bytes(b'not of Matlab'), NO_PROTOCOL),
        (lambda root: change_protocol(root, query_idx=None), f'{NO_PROTOCOL}KeyError: .query_idx'),
        (lambda root: change_protocol(root, query_idx=np.array([[1.0], [1000.0]])), f'{NO_PROTOCOL}IndexError: '),
        (
            lambda root: change_protocol(root, filelist=listing('0002_c1s1_000451_03.jpg')),
            '0002_c1s1_000451_03.jpg in .*config_labeled.mat does not fit the grammar',
        ),
    ],
)
def test_damaged_files_of_cuhk03_are_named(spoil, expected, tree):
    root = tree(CUHK03)
    spoil(root)
    with pytest.raises(InputError, match=expected) as error:
        CUHK03(str(root), 'test')
    assert message(error)


@pytest.mark.parametrize('name', ['1_001_1_05.png', '1_004_1_01.png', '1_001_2_11.png'])
def test_an_image_that_matlabs_file_lacks_is_named(name, tree):
    """An empty cell, a row beyond the last, a column beyond the last."""
    root = tree(CUHK03)
    change_protocol(root, filelist=listing(name))
    dataset = CUHK03(str(root), 'query')
    with pytest.raises(ValueError, match=f'cuhk-03.mat has no labeled image {name}, which the protocol names'):
        dataset[0]


@pytest.mark.parametrize('module', ['h5py', 'scipy.io'])
def test_a_missing_library_is_named(module, tree, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f'CUHK03 needs {module[:4]}.* pip install {module[:4]}'):
        CUHK03(str(tree(CUHK03)), 'test')

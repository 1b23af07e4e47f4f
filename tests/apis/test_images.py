"""Images of a config without annotations: through its own loading steps, data sets and what wraps them."""

import json
import os
from pathlib import Path

import cv2
import mmdet.datasets  # noqa: F401
import mmpretrain.datasets  # noqa: F401
import mmseg.datasets  # noqa: F401
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, Compose
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from mmpretrain.datasets import CIFAR10, CustomDataset, PackInputs
from mmpretrain.models import SelfSupDataPreprocessor
from mmseg.datasets import BaseSegDataset
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from helpers import ROOT
from mmdenoiserep.apis import images as images_module
from mmdenoiserep.apis.calibration import with_progress_bar
from mmdenoiserep.apis.config import use_tta
from mmdenoiserep.apis.export import image_shape
from mmdenoiserep.apis.folders import find_images
from mmdenoiserep.apis.images import Batches, NoImage, datasets_of, image_channels, open_images, take_spread
from mmdenoiserep.apis.matches import _read_images
from mmdenoiserep.apis.visualization import CorruptedImages
from mmdenoiserep.core import InputError
from tiny_datasets import write_fashion_mnist

COUNT = 8


@TRANSFORMS.register_module()
class LoadNegative(LoadImageFromFile):
    """A loading step by a name that no library has."""

    def transform(self, results):
        found = super().transform(results)
        return None if found is None else found | dict(img=255 - found['img'])


@TRANSFORMS.register_module()
class Slip(BaseTransform):
    def __init__(self, error):
        self.error = error

    def transform(self, results):
        raise self.error('a slip in my own step')


def step(function):
    """Registers a step of the user under the name of a function."""
    members = dict(transform=lambda self, results: results | function(results))
    return TRANSFORMS.register_module(module=type(function.__name__, (BaseTransform,), members))


@step
def ThermalReader(results):
    """A loading step whose name does not say that it loads; reads arrays with six channels."""
    image = np.load(results['img_path'])
    return dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])


@step
def LoadTwice(results):
    """No loading step, whatever its name is: changes an image that is loaded."""
    return dict(img=results['img'] // 2)


@step
def NeedsLabel(results):
    return dict(twice=2 * results['gt_label'])


@step
def SlipWhileLoading(results):
    return dict(img=cv2.imread(results['img_path'])[[[0]] * 9].reshape(3, 1))


@step
def LoadPillow(results):
    """Loads for the transforms of torchvision."""
    return dict(img=Image.open(results['img_path']))


@step
def LoadFromImg(results):
    return dict(img=cv2.imread(results['img']))


@TRANSFORMS.register_module()
class LoadAndPack(BaseTransform):
    """Packs what it loads, as steps of the user that know nothing of ``img``."""

    def transform(self, results):
        return dict(inputs=torch.from_numpy(cv2.imread(results['img_path'])).permute(2, 0, 1))


@TRANSFORMS.register_module()
class OwnAnnotations(LoadAnnotations):
    """Needs what a folder has not."""

    def transform(self, results):
        return results | dict(gt=results['instances'][0])


@TRANSFORMS.register_module()
class LeavesOut(BaseTransform):
    """Filters images as users do, by returning None; at random other data sets take another image for it."""

    def __init__(self, names):
        self.names = names

    def transform(self, results):
        return None if Path(results['img_path']).name in self.names else results


@DATASETS.register_module()
class Half(BaseDataset):
    """A data set of the user, which filters in ``prepare_data``."""

    def load_data_list(self):
        return [dict(img_path=str(path), gt_label=0) for path in sorted(Path(self.data_root).rglob('*.png'))]

    def prepare_data(self, index):
        return None if index % 2 else super().prepare_data(index)


@DATASETS.register_module()
class Plain(Dataset):
    """A data set of the user that knows nothing of mmengine: packs on its own, under another attribute."""

    def __init__(self, root, pipeline, missing=()):
        self.paths = sorted(Path(root).rglob('*.png'))
        self.steps = Compose(pipeline)
        self.missing = missing

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return None if index in self.missing else self.steps(dict(img_path=str(self.paths[index])))


@DATASETS.register_module()
class Bare(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), 0


@DATASETS.register_module()
class Buggy(BaseDataset):
    def load_data_list(self):
        raise ZeroDivisionError('a slip in my own data set')


def picture(number, shape=(16, 16, 3)):
    return np.random.default_rng(number).integers(0, 255, shape, np.uint8)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Eight pictures of two classes."""
    root = tmp_path_factory.mktemp('images')
    for i in range(COUNT):
        (root / f'{i % 2}').mkdir(exist_ok=True)
        cv2.imwrite(str(root / f'{i % 2}/{i}.png'), picture(i))
    return root


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]


def config(dataset, train=None, **more):
    loaders = dict(test_dataloader=dict(batch_size=2, dataset=dataset))
    if train is not None:
        loaders['train_dataloader'] = dict(batch_size=2, dataset=train)
    return Config(dict(default_scope='mmpretrain', **loaders, **more))


def custom(root, pipeline=PIPELINE, **more):
    return dict(type='CustomDataset', data_root=str(root), pipeline=pipeline, **more)


def names(images):
    """Returns the names of the files of some images, as their data samples have them."""
    read = [images[i] for i in range(len(images))]
    assert not [image.sentence for image in read if isinstance(image, NoImage)]
    return [Path(image['data_samples'].img_path).name for image in read]


def order(root):
    return [path.name for path in sorted(root.rglob('*.png'))]


def pixels(packed):
    """Returns the pixels of an image, (H, W, C), in the order in which it reaches the model."""
    return packed['inputs'].permute(1, 2, 0).numpy()


def both(cfg, folder):
    """Returns the images of a folder, and those of the test data set."""
    return open_images(cfg, folder=folder), open_images(cfg)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.data_preprocessor = ImgDataPreprocessor()


# Loading steps


@pytest.mark.parametrize('where', ['folder', 'test', 'train'])
def test_own_loading_steps_stay(root, where):
    steps = [dict(type='LoadNegative'), dict(type='LoadTwice'), PIPELINE[1]]
    train = custom(root, [PIPELINE[0], dict(type='RandomFlip', prob=1.0), PIPELINE[1]])
    cfg = config(custom(root, steps), train)
    images = open_images(cfg, folder=root) if where == 'folder' else open_images(cfg, where)
    assert len(images) == COUNT
    for i, path in enumerate(sorted(root.rglob('*.png'))):
        expected = (255 - cv2.imread(str(path))) // 2
        assert np.array_equal(pixels(images[i]), expected)


@DATASETS.register_module()
class SpectraBySignature(BaseSegDataset):
    METAINFO = dict(classes=('a',), palette=[[0, 0, 0]])

    def __init__(self, img_suffix='.npy', **more):
        super().__init__(img_suffix=img_suffix, **more)


@DATASETS.register_module()
class SpectraByCall(BaseSegDataset):
    METAINFO = dict(classes=('a',), palette=[[0, 0, 0]])

    def __init__(self, **more):
        super().__init__(img_suffix='.npy', **more)


@pytest.mark.parametrize('kind', ['CustomDataset', 'SpectraBySignature', 'SpectraByCall', SpectraByCall, CustomDataset])
@pytest.mark.parametrize('wrapped', [False, True])
def test_six_channels_and_suffixes_of_the_config_or_of_the_class_of_the_data_set(tmp_path, kind, wrapped):
    """As HSIDrive20Dataset of mmseg, whose images are .npy; types may be classes, as in lazy configs."""
    (tmp_path / 'a').mkdir()
    for i in range(3):
        np.save(tmp_path / f'a/{i}.npy', picture(i, (8, 8, 6)))
    named = isinstance(kind, str)
    steps = [dict(type='ThermalReader' if named else ThermalReader), PIPELINE[1] if named else dict(type=PackInputs)]
    data = dict(type=kind, data_prefix=dict(img_path=str(tmp_path / 'a')), pipeline=steps)
    if kind in ('CustomDataset', CustomDataset):
        data = dict(type=kind, data_root=str(tmp_path), extensions=('.npy',), pipeline=steps)
    cfg = config(dict(type='RepeatDataset', times=2, dataset=data) if wrapped else data)
    for images in both(cfg, tmp_path):
        assert len(images) == 3
        assert np.array_equal(pixels(images[2]), picture(2, (8, 8, 6)))


def test_folders_of_pgm(tmp_path):
    for i in range(2):
        cv2.imwrite(str(tmp_path / f'{i}.pgm'), picture(i, (8, 8)))
    cfg = config(custom(tmp_path, with_label=False))
    assert [len(open_images(cfg, folder=tmp_path)), len(open_images(cfg)), len(find_images(tmp_path))] == [2, 2, 2]


@pytest.mark.parametrize('kind', ['LoadAnnotations', 'mmdet.LoadAnnotations', 'mmdet.LoadProposals', 'OwnAnnotations'])
def test_steps_that_load_annotations_are_left_out(root, kind):
    for images in both(config(custom(root, [PIPELINE[0], dict(type=kind), PIPELINE[1]])), root):
        assert names(images) == order(root)


def test_a_step_of_the_user_that_needs_annotations_works_where_they_are(root):
    cfg = config(custom(root, [PIPELINE[0], dict(type='NeedsLabel'), PIPELINE[1]]))
    assert names(open_images(cfg)) == order(root)
    with pytest.raises(KeyError, match='gt_label'):
        open_images(cfg, folder=root)[0]


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_a_folder_is_read_in_the_channels_of_the_model_where_no_step_loads(tmp_path, channels):
    """MNIST's and CUHK-03's pipelines start from arrays. A resizing step wants an image, a packing one does not."""
    cv2.imwrite(str(tmp_path / '0.png'), picture(0, (16, 16, 4)))
    backbone = dict(type='ResNet', depth=18, in_channels=channels)
    for steps in ([PIPELINE[1]], [dict(type='RandomCrop', crop_size=16), PIPELINE[1]]):
        cfg = config(custom(tmp_path, steps), model=dict(type='ImageClassifier', backbone=backbone))
        packed = open_images(cfg, folder=tmp_path, model=nn.Identity())[0]
        assert packed['inputs'].shape == (channels, 16, 16)
        flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR, 4: cv2.IMREAD_UNCHANGED}[channels]
        expected = cv2.imread(str(tmp_path / '0.png'), flag).reshape(16, 16, channels)
        assert np.array_equal(pixels(packed), expected)


def test_six_channels_are_read_by_no_standard_step(root):
    cfg = config(custom(root, [PIPELINE[1]]), model=dict(backbone=dict(type='ResNet', depth=18, in_channels=6)))
    image = open_images(cfg, folder=root, model=nn.Identity())[0]
    assert isinstance(image, NoImage) and '0.png is loaded by no step' in image.sentence


def test_the_loading_step_of_the_config_decides_the_colours(root):
    steps = [dict(type='LoadImageFromFile', color_type='grayscale'), PIPELINE[1]]
    cfg = config(custom(root, steps), model=dict(backbone=dict(type='ResNet', depth=18)))
    assert open_images(cfg, folder=root, model=nn.Identity())[0]['inputs'].shape == (1, 16, 16)


@DATASETS.register_module()
class OwnColours(CIFAR10):
    """Brings arrays in RGB order, as that of mmpretrain."""

    def load_data_list(self):
        return [dict(img=picture(i)[..., ::-1], gt_label=0) for i in range(2)]


@pytest.mark.parametrize('wrapped', [False, True])
def test_files_are_read_in_the_colours_of_the_arrays_of_the_data_set(tmp_path, wrapped):
    """CIFAR's are RGB, and its model takes them as they are; others' are BGR."""
    for i in range(2):
        cv2.imwrite(str(tmp_path / f'{i}.png'), picture(i))
    data = dict(type='OwnColours', data_root=str(tmp_path), split='test', pipeline=[PIPELINE[1]])
    cfg = config(dict(type='ConcatDataset', datasets=[data]) if wrapped else data)
    cfg.model = dict(backbone=dict(type='ResNet', depth=18))
    files, arrays = open_images(cfg, folder=tmp_path, model=nn.Identity()), open_images(cfg)
    for i in range(2):
        assert torch.equal(files[i]['inputs'], arrays[i]['inputs'])
        assert np.array_equal(pixels(arrays[i]), picture(i)[..., ::-1])
    for images in (files, arrays):
        assert np.array_equal(images.load(1), picture(1)[..., ::-1])
        seen = CorruptedImages(images, 'clean')
        assert torch.equal(seen[1]['inputs'], arrays[1]['inputs']) and np.array_equal(seen.image, picture(1))


# Data sets and what wraps them


def wrappers(root):
    """Returns wrapped data sets, and the names of their images."""
    data = custom(root)
    all_of = order(root)
    fold = dict(type='KFoldDataset', dataset=data, fold=1, num_splits=4)
    few = custom(root, indices=[0, 1, 2, 3, 4])  # four of class 0, one of class 1
    balanced = dict(type='ClassBalancedDataset', dataset=few, oversample_thr=0.8)
    mix = dict(dataset=data, pipeline=[dict(type='mmdet.Mosaic', prob=1.0)])
    return {
        'fold': (fold, all_of[:2] + all_of[4:]),
        'held out': (dict(fold, test_mode=True), all_of[2:4]),
        'concat': (dict(type='ConcatDataset', datasets=[data, fold]), all_of + all_of[:2] + all_of[4:]),
        'repeat': (dict(type='RepeatDataset', times=3, dataset=data), all_of),
        'class balanced': (balanced, all_of[:5] + all_of[4:5]),
        'repeat in concat': (
            dict(type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=3, dataset=data), few]),
            all_of + all_of[:5],
        ),
        'repeated fold': (dict(type='RepeatDataset', times=2, dataset=fold), all_of[:2] + all_of[4:]),
        'mixed by mmdet': (dict(mix, type='mmdet.MultiImageMixDataset'), all_of),
        'mixed by mmseg': (dict(mix, type='mmseg.MultiImageMixDataset'), all_of),
        'concat of mmdet': (dict(type='mmdet.ConcatDataset', datasets=[few, few]), all_of[:5] * 2),
        'list': ([data, fold], all_of + all_of[:2] + all_of[4:]),
        'indices': (few, all_of[:5]),
    }


@pytest.mark.parametrize('name', wrappers(ROOT / 'tools'))
def test_images_are_those_of_the_wrapped_data_set(root, name):
    """Each as the test pipeline gives it: not mixed, not augmented; a repeated one once."""
    wrapped, expected = wrappers(root)[name]
    cfg = config(custom(root), wrapped)
    before = cfg.to_dict()
    images = open_images(cfg, 'train')
    assert names(images) == expected
    for i in (0, len(images) - 1):
        path = images[i]['data_samples'].img_path
        assert np.array_equal(pixels(images[i]), cv2.imread(path))
        assert images.info(i)['img_path'] == path
    assert cfg.to_dict() == before, 'the config stays as it is'
    if name in ('fold', 'concat', 'repeat', 'class balanced', 'repeat in concat', 'list'):
        assert names(open_images(config(wrapped))) == expected


def test_a_copied_data_set_keeps_its_own_steps(root, monkeypatch):
    """mmengine's memo of all copies has the ids of objects that are gone, which new objects get again."""
    step = LoadImageFromFile()
    fold = dict(type='KFoldDataset', dataset=custom(root, [step, PIPELINE[1]]), fold=1, num_splits=4)
    monkeypatch.setattr(BaseDataset._copy_without_annotation, '__defaults__', ({id(step): 'an object that is gone'},))
    images = open_images(config(fold))
    assert names(images) == wrappers(root)['fold'][1]
    assert images.dataset.dataset.pipeline.steps[0] is not step, 'the data set was copied'


def test_lazy_configs(root, tmp_path):
    (tmp_path / 'lazy.py').write_text(
        'from mmengine.dataset import ConcatDataset, RepeatDataset\n'
        'from mmpretrain.datasets import CustomDataset, KFoldDataset, LoadImageFromFile, PackInputs, RandomFlip\n'
        'from mmpretrain.models import ResNet\n'
        'pipeline = [dict(type=LoadImageFromFile), dict(type=PackInputs)]\n'
        'data = dict(type=CustomDataset, data_root=ROOT, pipeline=pipeline)\n'
        'flip = [dict(type=LoadImageFromFile), dict(type=RandomFlip, prob=1.0), dict(type=PackInputs)]\n'
        'fold = dict(type=KFoldDataset, dataset=dict(data, pipeline=flip), fold=0, num_splits=4)\n'
        'repeat = dict(type=RepeatDataset, dataset=dict(data, pipeline=flip), times=2)\n'
        'train_dataloader = dict(dataset=dict(type=ConcatDataset, datasets=[fold, repeat]))\n'
        'test_dataloader = dict(dataset=data)\n'
        'model = dict(backbone=dict(type=ResNet, in_channels=5))\n'.replace('ROOT', repr(str(root)))
    )
    cfg = Config.fromfile(tmp_path / 'lazy.py')
    all_of = order(root)
    for images, expected in (
        (open_images(cfg, 'train'), all_of[2:] + all_of),
        (open_images(cfg), all_of),
        (open_images(cfg, folder=root), all_of),
    ):
        assert names(images) == expected
        path = images[0]['data_samples'].img_path
        assert np.array_equal(pixels(images[0]), cv2.imread(path))
    assert image_channels(cfg, nn.Identity()) == 5


def test_a_list_of_data_loaders(root):
    negative = [dict(type='LoadNegative'), PIPELINE[1]]
    parts = [custom(root / '0', with_label=False), custom(root / '1', negative, with_label=False)]
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=[dict(dataset=part) for part in parts]))
    images = open_images(cfg)
    assert names(images) == ['0.png', '2.png', '4.png', '6.png', '1.png', '3.png', '5.png', '7.png']
    assert np.array_equal(pixels(images[0]), cv2.imread(str(root / '0/0.png')))
    assert np.array_equal(pixels(images[4]), 255 - cv2.imread(str(root / '1/1.png')))
    with pytest.raises(InputError, match='2 different pipelines'):
        open_images(cfg, folder=root)


def test_a_data_set_of_parts_with_different_pipelines_is_named(root):
    parts = [custom(root), custom(root, [dict(type='LoadNegative'), PIPELINE[1]])]
    cfg = config(dict(type='ConcatDataset', datasets=parts), custom(root))
    assert len(open_images(cfg)) == 2 * COUNT
    for how in (dict(folder=root), dict(split='train')):
        with pytest.raises(InputError, match='ConcatDataset'):
            open_images(cfg, **how)


@pytest.mark.parametrize('wrapped', [False, True])
def test_built_data_sets(root, wrapped):
    steps = [dict(type='LoadNegative'), PIPELINE[1]]
    data = DATASETS.build(custom(root, steps))
    if wrapped:
        data = DATASETS.build(dict(type='RepeatDataset', dataset=data, times=2))
    cfg = Config(dict(default_scope='mmpretrain'))
    cfg._cfg_dict['test_dataloader'] = ConfigDict(dataset=data)
    before = data[0]['inputs']
    expected = 255 - cv2.imread(str(root / '0/0.png'))
    for images in both(cfg, root):
        assert names(images) == order(root)
        assert np.array_equal(pixels(images[0]), expected)
        changed = images.after_loading(lambda image, index: image * 0)
        assert not changed[0]['inputs'].any() and images[0]['inputs'].any()
    assert torch.equal(data[0]['inputs'], before)
    cfg._cfg_dict['test_dataloader'] = DataLoader(data, batch_size=2)
    assert names(open_images(cfg)) == order(root)


def test_a_data_set_of_the_user_that_mmengine_does_not_know(root):
    data = dict(type='Plain', root=str(root), pipeline=PIPELINE)
    flip = dict(type='Plain', root=str(root), pipeline=[PIPELINE[0], dict(type='RandomFlip', prob=1.0), PIPELINE[1]])
    for images in (open_images(config(data)), open_images(config(data, flip), 'train')):
        assert names(images) == order(root)
        assert np.array_equal(pixels(images[0]), cv2.imread(str(root / '0/0.png')))
    image = open_images(config(dict(type='Bare')))[1]
    assert isinstance(image, NoImage) and 'comes as tuple' in image.sentence
    with pytest.raises(InputError, match='Bare'):
        open_images(config(dict(type='Bare')), after_loading=lambda image, index: image)


def test_detection_without_and_with_the_wrapper_of_mosaic(tmp_path):
    """YOLOX's way: the inner pipeline only loads, the outer one mixes and packs."""
    for i in range(3):
        cv2.imwrite(str(tmp_path / f'{i}.png'), picture(i))
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[1, 1, 8, 8], area=64, iscrowd=0) for i in range(2)]
    pictures = [dict(id=i, file_name=f'{i}.png', width=16, height=16) for i in range(3)]
    coco = dict(images=pictures, annotations=boxes, categories=[dict(id=1, name='a')])
    (tmp_path / 'a.json').write_text(json.dumps(coco))
    known = dict(ann_file=str(tmp_path / 'a.json'), data_prefix=dict(img=str(tmp_path)), metainfo=dict(classes=('a',)))
    known['type'] = 'CocoDataset'
    loading = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    mixing = [dict(type='Mosaic', img_scale=(16, 16)), dict(type='PackDetInputs')]
    inner = dict(known, pipeline=loading, filter_cfg=dict(filter_empty_gt=True))
    train = dict(type='MultiImageMixDataset', dataset=inner, pipeline=mixing)
    cfg = config(dict(known, test_mode=True, pipeline=[*loading, mixing[1]]), train)
    cfg.default_scope = 'mmdet'
    for split, count in dict(train=2, test=3).items():  # the training leaves out what has no box
        images = open_images(cfg, split)
        assert len(images) == count
        for i in range(count):
            assert np.array_equal(pixels(images[i]), picture(i))
            assert not len(images[i]['data_samples'].gt_instances)


def test_segmentation_with_labels_that_are_not_read(tmp_path):
    for i in range(3):
        cv2.imwrite(str(tmp_path / f'{i}.jpg'), picture(i))
        (tmp_path / f'{i}.png').write_bytes(b'no map')
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    data = dict(
        type='BaseSegDataset', data_prefix=dict(img_path=str(tmp_path), seg_map_path=str(tmp_path)), pipeline=steps
    )
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=data), train_dataloader=dict(dataset=data)))
    for images in (open_images(cfg), open_images(cfg, 'train')):
        assert [images[i]['inputs'].shape for i in range(3)] == [(3, 16, 16)] * 3


def test_the_validation_pipeline_stands_in_for_a_test_pipeline(root):
    cfg = Config(dict(default_scope='mmpretrain', val_dataloader=dict(dataset=custom(root))))
    assert names(open_images(cfg, folder=root)) == names(open_images(cfg, 'val')) == order(root)
    for none, where in ((cfg, {}), (Config(dict(default_scope='mmpretrain')), dict(folder=root))):
        with pytest.raises(InputError, match='no test_dataloader'):
            open_images(none, **where)


# Images that are not there


def test_what_the_config_leaves_out_is_skipped_and_named(root, tmp_path, capsys):
    copy = tmp_path / 'copy'
    for path in root.rglob('*.png'):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(root)).write_bytes(path.read_bytes() if path.name != '3.png' else b'')
    tolerant = [dict(type='LoadNegative', ignore_empty=True), PIPELINE[1]]
    picky = [dict(type='LeavesOut', names=['3.png']), *PIPELINE]
    late = [PIPELINE[0], dict(type='LeavesOut', names=['3.png']), PIPELINE[1]]
    rest = [name for name in order(root) if name != '3.png']
    for cfg, where, expected in (
        (config(custom(copy, tolerant)), dict(folder=copy), rest),
        (config(custom(copy, tolerant)), dict(), rest),
        (config(custom(copy, tolerant, test_mode=True)), dict(), rest),
        (config(custom(copy, tolerant), custom(copy)), dict(split='train'), rest),
        (config(custom(copy, picky)), dict(folder=copy), rest),
        (config(custom(root, late)), dict(), rest),
        (config(dict(type='Half', data_root=str(root), pipeline=PIPELINE)), dict(), order(root)[::2]),
        (config(dict(type='Half', data_root=str(root), pipeline=PIPELINE, test_mode=True)), dict(), order(root)[::2]),
        (config(dict(type='Plain', root=str(root), pipeline=PIPELINE, missing=[5])), dict(), rest),
    ):
        images = open_images(cfg, **where)
        batches = Batches(Model(), images, 3)
        pixels = torch.cat(list(batches))
        assert len(images) == COUNT and len(pixels) == len(expected)
        assert [names([images[i]])[0] for i in batches.order] == expected
        said = capsys.readouterr().err
        assert len(said.splitlines()) == COUNT - len(expected) == len(batches.left_out)
        assert '3.png' in said or 'image 5' in said
        list(batches)
        assert not capsys.readouterr().err, 'it is said once, not in every pass'


def test_nothing_is_left(root):
    steps = [dict(type='LeavesOut', names=order(root)), *PIPELINE]
    with pytest.raises(InputError, match='no image is left: .*0.png'):
        list(Batches(Model(), open_images(config(custom(root, steps))), 2))


@pytest.mark.parametrize('wrapper', [dict(type='KFoldDataset'), dict(type='RepeatDataset', times=2), None])
def test_empty_data_sets(root, wrapper, tmp_path):
    data = dict(type='Half', data_root=str(tmp_path), pipeline=PIPELINE)
    with pytest.raises(InputError, match='data set of train_dataloader in the config is empty'):
        open_images(config(custom(root), dict(wrapper, dataset=data) if wrapper else data), 'train')


@pytest.mark.parametrize('content', [b'', b'no picture'])
@pytest.mark.parametrize('step', ['LoadImageFromFile', 'LoadNegative'])
def test_files_that_cannot_be_read_are_named(tmp_path, content, step):
    (tmp_path / 'a').mkdir()
    cv2.imwrite(str(tmp_path / 'a/0.png'), picture(0))
    (tmp_path / 'a/1.png').write_bytes(content)
    for images in both(config(custom(tmp_path, [dict(type=step), PIPELINE[1]])), tmp_path):
        with pytest.raises(InputError, match='a/1.png cannot be read') as raised:
            list(Batches(Model(), images, 1, workers=1 if content else 0))
        assert 'Traceback' not in str(raised.value)


@pytest.mark.parametrize(
    ('data', 'error', 'words'),
    [
        (custom('nowhere'), InputError, 'train_dataloader in the config cannot be read'),
        (dict(type='NoSuchDataset'), InputError, 'train_dataloader in the config cannot be read.*NoSuch'),
        (dict(type='Buggy', data_root='nowhere', pipeline=[]), ZeroDivisionError, 'my own data set'),
    ],
)
def test_data_sets_that_cannot_be_read(root, data, error, words):
    with pytest.raises(error, match=words):
        open_images(config(custom(root), data), 'train')


SLIPS = [(dict(type='Slip', error=e), e, 'in my own step') for e in (ValueError, KeyError, AssertionError, OSError)]


@pytest.mark.parametrize(('slip', 'error', 'text'), [*SLIPS, (dict(type='SlipWhileLoading'), ValueError, 'reshape')])
def test_slips_in_steps_of_the_user_keep_their_traceback(root, slip, error, text):
    steps = [*([] if text == 'reshape' else PIPELINE[:1]), slip, PIPELINE[1]]
    for images in both(config(custom(root, steps)), root):
        with pytest.raises(error, match=text) as raised:
            list(Batches(Model(), images, 1))
        assert text == 'reshape' or any('Slip' in type(e.locals.get('self')).__name__ for e in raised.traceback)


def test_several_images_of_one_are_refused_by_name(root):
    tta = dict(type='TestTimeAug', transforms=[[dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)], [PIPELINE[1]]])
    image = open_images(config(custom(root, [PIPELINE[0], tta])))[0]
    assert isinstance(image, NoImage) and 'test-time augmentation' in image.sentence


# CorruptedImages images


@pytest.mark.parametrize('kind, word', [('LoadAndPack', 'no img'), ('LoadPillow', 'PngImageFile')])
def test_what_is_loaded_as_no_array_is_not_taken_for_changed(root, kind, word):
    steps = [dict(type=kind), *([dict(type='torchvision/PILToTensor'), PIPELINE[1]] if word != 'no img' else [])]
    for where in (dict(), dict(folder=root)):
        images = open_images(config(custom(root, steps)), **where)
        rgb = images[0]['inputs'] if word != 'no img' else images[0]['inputs'].flip(0)
        assert np.array_equal(rgb.permute(1, 2, 0).numpy(), cv2.imread(str(root / '0/0.png'))[..., ::-1])
        spoiled = images.after_loading(lambda image, index: image * 0)[0]
        assert isinstance(spoiled, NoImage) and '0.png' in spoiled.sentence and word in spoiled.sentence
        with pytest.raises(InputError, match='image 0 of'):
            images.load(0)


@DATASETS.register_module()
class PathsUnderImg(BaseDataset):
    """Has the path of an image where others have its pixels."""

    def load_data_list(self):
        return [dict(img=str(path)) for path in sorted(Path(self.data_root).rglob('*.png'))]


def test_the_path_of_an_image_is_no_image(root):
    steps = [dict(type='LoadFromImg'), PIPELINE[1]]
    cfg = config(dict(type='PathsUnderImg', data_root=str(root), pipeline=steps))
    images = open_images(cfg, after_loading=lambda image, index: image // 2)
    assert np.array_equal(pixels(images[0]), cv2.imread(str(root / '0/0.png')) // 2)
    assert images.load(0).shape == (16, 16, 3)


@pytest.mark.parametrize('step', [dict(type='RandomCrop', crop_size=8), dict(type='RandomFlip', prob=0.5)])
def test_random_steps_draw_the_same_for_clean_and_for_corrupted_images(root, step):
    images = open_images(config(custom(root, [PIPELINE[0], step, PIPELINE[1]])))
    clean, contrast = CorruptedImages(images, 'clean'), CorruptedImages(images, 'contrast', 1.0)
    before = np.random.get_state()[1].tolist()
    seen = [clean[i]['inputs'] for i in range(COUNT)]
    assert all(torch.equal(contrast[i]['inputs'], seen[i]) for i in range(COUNT))
    assert np.random.get_state()[1].tolist() == before
    if step['type'] == 'RandomCrop':
        upright = [torch.from_numpy(images.load(i)).permute(2, 0, 1) for i in range(COUNT)]
        pairs = zip(upright, seen, strict=True)
        places = [(x.unfold(1, 8, 1).unfold(2, 8, 1) == y[:, None, None]).all((0, 3, 4)) for x, y in pairs]
        assert len({tuple(place.nonzero()[0].tolist()) for place in places}) > 2, 'not one place for all'


def test_images_are_changed_right_after_they_are_loaded(root):
    seen = []

    def change(image, index):
        seen.append((index, image.shape))
        return np.full_like(image, index)

    steps = [dict(type='LoadNegative'), dict(type='LoadTwice'), dict(type='Resize', scale=8), PIPELINE[1]]
    twice = dict(type='ConcatDataset', datasets=[custom(root, steps), custom(root, steps)])
    for images in (
        open_images(config(custom(root, steps)), folder=root, after_loading=change),
        open_images(config(twice), after_loading=change),
    ):
        seen.clear()
        assert [images[i]['inputs'].unique().tolist() for i in range(COUNT)] == [[i // 2] for i in range(COUNT)]
        assert seen == [(i, (16, 16, 3)) for i in range(COUNT)]
    assert images[12]['inputs'].unique().tolist() == [6]
    assert np.array_equal(open_images(config(twice)).load(9), 255 - cv2.imread(str(root / '0/2.png')))


def test_images_that_the_data_set_brings_are_changed(tmp_path):
    write_fashion_mnist(tmp_path / 'data')
    data = dict(type='FashionMNIST', data_root=str(tmp_path / 'data'), split='test', pipeline=[PIPELINE[1]])
    clean, dark = (open_images(config(data), after_loading=f) for f in (None, lambda image, index: image // 2))
    assert torch.equal(dark[1]['inputs'], clean[1]['inputs'] // 2) and clean[1]['inputs'].any()


# Batches


def test_alternating_sizes_make_full_batches(tmp_path, capsys):
    for i in range(11):
        cv2.imwrite(str(tmp_path / f'{i:02d}.png'), picture(i, (16 + 8 * (i % 2), 16, 3)))
    cfg = config(custom(tmp_path))
    batches = Batches(Model(), open_images(cfg, folder=tmp_path), 4)
    found = list(batches)
    assert [batch.shape[0] for batch in found] == [4, 4, 2, 1]
    assert sorted(batches.order) == list(range(11)) and batches.order[:4] == [0, 2, 4, 6]
    for number, image in zip(batches.order, (image for batch in found for image in batch), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(number, (16 + 8 * (number % 2), 16, 3)))
    with with_progress_bar(batches) as bar:
        assert len(list(bar)) == len(list(bar)) == 4
        assert bar.bar.n == bar.bar.total == 11


def test_images_of_many_sizes_do_not_pile_up(tmp_path, monkeypatch):
    for i in range(30):
        cv2.imwrite(str(tmp_path / f'{i:02d}.png'), picture(i, (8 + i, 8, 3)))
    read, given = [], 0
    images = open_images(config(custom(tmp_path)), folder=tmp_path, after_loading=lambda x, i: read.append(i) or x)
    for batch in Batches(Model(), images, 2):
        given += len(batch)
        assert len(read) - given <= 2 * images_module.MAX_WAITING + 2
    assert given == 30


def test_the_preprocessor_of_self_supervised_models_gets_images_not_views(root):
    model = Model()
    model.data_preprocessor = SelfSupDataPreprocessor(mean=[1.0, 2, 3], std=[4.0, 5, 6], to_rgb=True)
    images = open_images(config(custom(root)))
    expected = torch.stack([images[i]['inputs'] for i in range(4)])[:, [2, 1, 0]].float()
    expected = (expected - torch.tensor([1.0, 2, 3]).view(3, 1, 1)) / torch.tensor([4.0, 5, 6]).view(3, 1, 1)
    assert torch.equal(next(iter(Batches(model, images, 4))), expected)


def test_one_size_comes_in_the_order_of_the_data_set(root):
    batches = Batches(Model(), take_spread(open_images(config(custom(root))), 5), 2)
    assert [len(batch) for batch in batches] == [2, 2, 1] and batches.order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(('total', 'count'), [(4000, 1000), (4000, 500), (17, 5), (5, 5), (3, 8), (1, 1)])
def test_images_are_spread_over_the_data_set_and_over_its_pattern(total, count):
    chosen = take_spread(range(total), count).indices
    count = min(total, count)
    cuts = [total * i // count for i in range(count + 1)]
    assert all(low <= i < high for low, i, high in zip(cuts[:-1], chosen, cuts[1:], strict=True))
    if count >= 100:
        phases = np.bincount([i % 4 for i in chosen])  # such as the camera of images that are sorted by person
        assert phases.min() > 0.8 * count / 4
    shares = [take_spread(range(total), count, rank, 3).indices for rank in range(3)]
    assert sorted(sum(shares, [])) == chosen


# Channels


@pytest.mark.parametrize(
    'backbone, mean, first, expected',
    [
        (dict(type='ResNet', depth=18, in_channels=6), None, 64, 6),
        (dict(type='VisionTransformer', in_channels=1), [127.0], 3, 1),
        (dict(type='VisionTransformer'), None, 1, 3),
        (dict(type='DenoiseRepBackbone', backbone=dict(type='ResNet', depth=18, in_channels=5)), None, 3, 5),
        (dict(type='mmdet.CSPDarknet'), [0.0] * 7, 12, 7),
        (dict(type='mmdet.CSPDarknet'), None, 12, 3),
        (dict(type='mmdet.CSPDarknet'), [127.0], 1, 1),
        (dict(type='mmseg.MixVisionTransformer'), [127.0], 1, 3),
    ],
)
def test_channels_are_asked_of_the_config(backbone, mean, first, expected):
    model = dict(type='ImageClassifier', backbone=backbone)
    cfg = Config(dict(default_scope='mmpretrain', model=model, data_preprocessor=dict(mean=mean) if mean else {}))
    module = nn.Sequential(nn.Conv2d(first, 2, 1))
    assert image_channels(cfg, module) == expected
    cfg.model.backbone['img_size'] = 48
    assert image_shape(cfg, module, (8, 9)) == (expected, 8, 9)


@pytest.mark.parametrize(('kind', 'size'), [('SwinTransformerV2', 256), ('ResNet', 224)])
def test_the_size_of_an_image_is_the_default_of_the_backbone(kind, size):
    cfg = Config(dict(default_scope='mmpretrain', model=dict(backbone=dict(type=kind))))
    assert image_shape(cfg, nn.Identity(), None) == (3, size, size)


# Folders


@pytest.fixture
def folder(tmp_path):
    """Real folders and links, hidden copies, other files."""
    disk, inside = tmp_path / 'disk', tmp_path / 'in'
    (disk / 'deep').mkdir(parents=True)
    (inside / 'real.png').mkdir(parents=True)
    (inside / '.ipynb_checkpoints').mkdir()
    for path in (
        disk / 'a.png',
        disk / 'deep/b.JPG',
        inside / 'real.png/c.png',
        inside / 'real.png/c.TIFF',
        inside / 'real.png/._c.png',
        inside / '.ipynb_checkpoints/c-checkpoint.png',
    ):
        cv2.imwrite(str(path), picture(0)) if not path.name.startswith('._') else path.write_bytes(b'\0\5\x16\7')
    for name in ('Thumbs.db', 'labels.txt', 'more.txt', 'LICENCE', '.DS_Store'):
        (inside / name).touch()
    (inside / 'linked').symlink_to(disk)
    (inside / 'one.png').symlink_to(disk / 'a.png')
    (disk / 'deep/loop').symlink_to(inside)
    (inside / 'self').symlink_to(inside)
    return inside


def test_links_are_followed_and_what_is_left_out_is_counted(folder, capsys):
    found = [str(path.relative_to(folder)) for path in find_images(folder)]
    assert found == ['linked/a.png', 'linked/deep/b.JPG', 'one.png', 'real.png/c.TIFF', 'real.png/c.png']
    (said,) = capsys.readouterr().err.splitlines()
    assert '5 images' in said and '3 hidden' in said and '2 .txt' in said and '1 .db' in said
    assert '1 without a suffix' in said


def test_a_folder_of_images_alone_says_nothing(root, capsys):
    assert len(find_images(root)) == COUNT and not capsys.readouterr().err
    hidden = root.parent / '.hidden'
    hidden.symlink_to(root)
    assert len(find_images(hidden)) == COUNT, 'only what is in the folder may be hidden'


def test_folders_that_are_refused(folder, tmp_path):
    (folder / 'gone.png').symlink_to(tmp_path / 'unmounted/gone.png')
    with pytest.raises(InputError, match='gone.png is not a file but a link to .*unmounted'):
        find_images(folder)
    (folder / 'gone.png').unlink()
    os.mkfifo(folder / 'pipe.png')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/a.gif').touch()
    for path, words in (
        (folder, 'pipe.png is not a file'),
        (tmp_path / 'other', 'has no images .*it has 1 .gif'),
        (tmp_path / 'nowhere', 'nowhere is not a folder'),
    ):
        with pytest.raises(InputError, match=words):
            find_images(path)


def test_test_time_augmentation_reaches_every_part(root):
    wrapped = wrappers(root)['concat'][0]
    cfg = config(wrapped, tta_model=dict(type='ClsTTAModel'), tta_pipeline=[dict(type='LoadNegative')], model=dict())
    use_tta(cfg)
    parts = [leaf for dataset in datasets_of(cfg, 'test') for leaf in images_module.leaves(dataset)]
    assert len(parts) == 2 and all(part.pipeline == [dict(type='LoadNegative')] for part in parts)


def test_matches_of_a_wrapped_test_set_find_their_images(root):
    cfg = config(dict(type='ConcatDataset', datasets=[custom(root, indices=[0, 1]), custom(root)]))
    entry = dict(sample_idx=5, img_path=str(root / '1/3.png'))
    (image,) = _read_images(cfg, [entry], Path('m.json')).values()
    assert np.array_equal(image, cv2.imread(entry['img_path']))
    with pytest.raises(InputError, match='of another data set'):
        _read_images(cfg, [dict(entry, img_path='x')], Path('m.json'))
    fold = dict(type='KFoldDataset', dataset=custom(root), fold=0, num_splits=4)
    entry = dict(sample_idx=0, img_path=str(root / '0/4.png'))
    (image,) = _read_images(config(fold), [entry], Path('m.json')).values()
    assert np.array_equal(image, cv2.imread(entry['img_path']))


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split must be one of train, val, test, got 'valid'"):
        open_images(Config({}), 'valid')

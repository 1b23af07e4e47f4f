"""The tools around re-identification: the picture of the matches, and features of a folder of images."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from mmpretrain.datasets import BaseDataset

from helpers import randomise
from mmdenoiserep import fuse_checkpoint
from mmdenoiserep.apis import matches
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.model import build_model
from tools_helpers import run_tool, sentence

MEAN, STD = [90.0, 100.0, 110.0], [50.0, 60.0, 70.0]
CONFIG = f"""
default_scope = 'mmpretrain'
custom_imports = dict(
    imports=['mmdenoiserep.tasks.reid', 'mmdenoiserep.evaluation.reid_metric'], allow_failed_imports=False)
data_preprocessor = dict(mean={MEAN}, std={STD}, to_rgb=True)
backbone = dict(type='VisionTransformer', img_size=(32, 16), patch_size=8, out_type='cls_token',
                arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64))
model = dict(type='ImageClassifier', backbone=backbone, head=dict(type='BNNeckReIDHead', num_classes=3, in_channels=32))
meta_keys = ('sample_idx', 'img_path', 'pid', 'camid', 'is_query')
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(16, 32)),
            dict(type='PackInputs', meta_keys=meta_keys)]
test_dataloader = dict(dataset=dict(type='Strips', data_root='strips', pipeline=pipeline))
test_evaluator = dict(type='ReIDMetric', matches_file='matches.json', num_matches=4)
"""
DENOISED = """
_base_ = './config.py'
model = dict(backbone=dict(_delete_=True, type='DenoiseRepBackbone', backbone=_base_.backbone, targets='mlp'))
"""
QUERIES = 6


@DATASETS.register_module()
class Strips(BaseDataset):
    """Named by identity and camera; the first images are queries. With ``loaded`` it brings ``img`` itself."""

    def __init__(self, loaded=False, **kwargs):
        self.loaded = loaded
        super().__init__(ann_file='', test_mode=True, **kwargs)

    def load_data_list(self):
        samples = []
        for i, path in enumerate(sorted(Path(self.data_root).glob('*.png'))):
            _, pid, camid = map(int, path.stem.split('_'))
            samples.append(dict(img_path=str(path), pid=pid, camid=camid, is_query=i < QUERIES))
        return samples

    def prepare_data(self, idx):
        sample = self.get_data_info(idx)
        if self.loaded:
            sample['img'] = cv2.imread(sample['img_path'])
        return self.pipeline(sample)


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with images, both configs, random weights with and without denoisers, and a file of matches."""
    folder = tmp_path_factory.mktemp('reid')
    generator = np.random.default_rng(0)
    (folder / 'strips').mkdir()
    for i in range(QUERIES + 14):
        pid = i % 3 + 1
        image = generator.integers(0, 200, (24 + i, 12, 3), dtype=np.uint8)
        image[:, :, pid - 1] += 25  # BGR: identity 1 is a little blue, so it is found better than by chance
        assert cv2.imwrite(str(folder / f'strips/{i:02d}_{pid}_{i // 3 % 2}.png'), image)
    (folder / 'config.py').write_text(CONFIG)
    (folder / 'denoised.py').write_text(DENOISED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ('config', 'denoised'):
            torch.manual_seed(0)
            model = randomise(build_model(load_config(f'{name}.py')))
            torch.save(dict(meta={}, state_dict=model.state_dict()), f'{name}.pth')
        write_matches()
    return folder


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)
    init_default_scope('mmpretrain')


def write_matches():
    cfg = Config.fromfile('config.py')
    model = build_model(load_config('config.py'))
    model.load_state_dict(torch.load('config.pth')['state_dict'])
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    evaluator = Evaluator(cfg.test_evaluator)
    for i in range(len(dataset)):
        with torch.no_grad():
            evaluator.process(model.test_step({key: [value] for key, value in dataset[i].items()}))
    evaluator.evaluate(len(dataset))


def drawn(monkeypatch, *args):
    """Draws, and returns the rows of the figure, each the axes with an image."""
    figures = []
    draw = matches._draw
    monkeypatch.setattr(matches, '_draw', lambda *given: figures.append(draw(*given)) or figures[-1])
    run_tool('draw_matches', 'config.py', 'matches.json', 'out.png', '--overwrite', *args)
    axes = figures[0].axes
    columns = axes[0].get_gridspec().ncols
    rows = [axes[i : i + columns] for i in range(0, len(axes), columns)]
    return [[cell for cell in row if cell.images] for row in rows]


def test_the_picture(monkeypatch):
    entries = json.loads(Path('matches.json').read_text())
    rows = drawn(monkeypatch, '--queries', '6')
    assert len(rows) == len(entries) == 6
    colours = set()
    for row, entry in zip(rows, entries, strict=True):
        assert len(row) == 1 + len(entry['matches']) == 5
        for axes, image in zip(row, [entry, *entry['matches']], strict=True):
            expected = matches.GREY
            if 'correct' in image:
                expected = matches.GREEN if image['pid'] == entry['pid'] else matches.RED
            assert {to_hex(spine.get_edgecolor()) for spine in axes.spines.values()} == {to_hex(expected)}
            colours.add(expected)
            assert np.array_equal(axes.images[0].get_array(), cv2.imread(image['img_path'])[..., ::-1])
            figure = f'{image["distance"]:.3f}' if 'distance' in image else f'AP {image["ap"]:.2f}'
            assert axes.get_xlabel() == f'{figure}\nid {image["pid"]}, cam {image["camid"]}'
    assert len(colours) == 3
    picture = cv2.imread('out.png')
    for colour in (matches.GREEN, matches.RED):
        bgr = [int(colour[i : i + 2], 16) for i in (5, 3, 1)]
        assert (picture == bgr).all(2).sum() > 1000
    assert not list(Path().glob('.*'))


def test_hardest_queries(monkeypatch):
    precisions = sorted(entry['ap'] for entry in json.loads(Path('matches.json').read_text()))
    rows = drawn(monkeypatch, '--queries', '3', '--hardest')
    labels = [row[0].get_xlabel().partition('\n')[0] for row in rows]
    assert labels == [f'AP {value:.2f}' for value in precisions[:3]] and precisions[0] < precisions[-1]


def test_random_queries_depend_on_the_seed_alone(monkeypatch):
    def chosen(seed):
        with monkeypatch.context() as patch:
            ((query, *_),) = drawn(patch, '--queries', '1', '--seed', seed)
        return query.images[0].get_array().tobytes()

    assert chosen(3) == chosen(3) and len({chosen(seed) for seed in range(5)}) > 1


def test_fewer_matches_than_columns(monkeypatch):
    entries = json.loads(Path('matches.json').read_text())
    entries[1]['matches'] = entries[1]['matches'][:2]
    Path('fewer.json').write_text(json.dumps(entries))
    draw_rows = []
    show = matches._show
    monkeypatch.setattr(matches, '_show', lambda *args: draw_rows.append(args[1]['sample_idx']) or show(*args))
    run_tool('draw_matches', 'config.py', 'fewer.json', 'fewer.png', '--queries', '99')
    assert len(draw_rows) == 6 * 5 - 2


def test_a_data_set_that_brings_its_images(monkeypatch):
    """As CUHK-03 does: its pipeline has no step that loads."""
    options = ['test_dataloader.dataset.loaded=True', 'test_dataloader.dataset.pipeline=[]']
    rows = drawn(monkeypatch, '--cfg-options', *options)
    assert np.array_equal(rows[0][0].images[0].get_array(), cv2.imread('strips/00_1_0.png')[..., ::-1])


def test_images_behind_wrappers_and_in_grey():
    cfg = Config.fromfile('config.py')
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=cfg.test_dataloader.dataset)
    entries = json.loads(Path('matches.json').read_text())
    images = matches._read_images(cfg, [entries[0], *entries[0]['matches']], Path('matches.json'))
    assert np.array_equal(images[0], cv2.imread('strips/00_1_0.png', cv2.IMREAD_GRAYSCALE))
    shown = matches._draw(entries[:1], images).axes[0].images[0].get_array()
    assert np.array_equal(shown, np.repeat(images[0][..., None], 3, 2))


@pytest.mark.parametrize(
    ('pixels', 'colour'),
    [
        (np.full((8, 4, 4), [255, 0, 0, 9], np.uint8), [0, 0, 255]),
        (np.full((8, 4, 3), [255.0, 0, 0], np.float32), [0, 0, 255]),
        (np.full((8, 4, 3), [4095, 0, 0], np.uint16), [0, 0, 255]),
        (np.full((8, 4, 6), [255, 0, 0, 9, 9, 9], np.uint8), [0, 0, 255]),
        (np.full((8, 4), 4095, np.uint16), [255, 255, 255]),
    ],
)
def test_images_of_other_kinds_are_drawn_as_people_see_them(pixels, colour):
    entries = json.loads(Path('matches.json').read_text())
    images = {image['sample_idx']: pixels for entry in entries[:1] for image in (entry, *entry['matches'])}
    for axes in matches._draw(entries[:1], images).axes[:2]:
        assert (axes.images[0].get_array() == colour).all()


def changed(change):
    entries = json.loads(Path('matches.json').read_text())
    change(entries)
    Path('changed.json').write_text(json.dumps(entries))
    return 'changed.json'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda entries: entries[0].update(sample_idx=1000), 'changed.json is of another data set: its image 1000 is'),
        (lambda entries: entries[0]['matches'][1].update(img_path='x.png'), 'is x.png, in the test data set it is'),
        (lambda entries: entries[2].pop('ap'), "is no file of ReIDMetric(matches_file=...): KeyError 'ap'"),
        (lambda entries: entries[2]['matches'][0].pop('distance'), 'is no file of ReIDMetric'),
        (lambda entries: entries[2].update(matches=3), 'is no file of ReIDMetric'),
        (lambda entries: entries.clear(), 'changed.json has no queries'),
    ],
)
def test_matches_that_do_not_fit(change, text):
    assert text in sentence('draw_matches', 'config.py', changed(change), 'no.png', '--queries', '6')
    assert not Path('no.png').exists()


def test_bad_arguments_of_the_picture():
    Path('half.json').write_text(Path('matches.json').read_text()[:-9])
    Path('binary.json').write_bytes(b'\x80\x02\xff')
    Path('there.png').write_text('mine')
    for text, found, output, *options in (
        ('half.json is not JSON', 'half.json', 'no.png'),
        ('binary.json is not JSON', 'binary.json', 'no.png'),
        ('none.json cannot be read: No such file', 'none.json', 'no.png'),
        ('no.jpg must end with .png', 'matches.json', 'no.jpg'),
        ('there.png exists; name another file, or pass --overwrite', 'matches.json', 'there.png'),
        ('the folder none does not exist', 'matches.json', 'none/no.png'),
        ('the config config.py has no test_dataloader', 'matches.json', 'no.png', 'test_dataloader=None'),
        (
            'of test_dataloader in the config config.py cannot be read',
            'matches.json',
            'no.png',
            'test_dataloader.dataset.type=Nothing',
        ),
    ):
        options = ['--cfg-options', *options] if options else []
        assert text in sentence('draw_matches', 'config.py', found, output, *options)
    assert Path('there.png').read_text() == 'mine' and not Path('no.png').exists()


def features_by_hand(model, paths):
    """Features of image files one by one, without the library's pipeline and preprocessing."""
    rows = []
    for path in paths:
        image = cv2.resize(cv2.imread(str(path)), (16, 32), interpolation=cv2.INTER_LINEAR)[..., ::-1]
        image = (image.astype(np.float32) - MEAN) / STD
        tensor = torch.from_numpy(image.transpose(2, 0, 1)).float()[None]
        with torch.no_grad():
            rows.append(model.backbone(tensor)[-1][0].numpy())
    return np.stack(rows)


def extracted(*args):
    """Extracts into a file and returns its content, which needs no pickle."""
    run_tool('extract_features', *args, 'out.npz', '--overwrite', '--device', 'cpu')
    with np.load('out.npz') as content:
        return content['features'], content['paths'].tolist()


@pytest.fixture
def images(tmp_path):
    """A folder with images in folders, some with rare suffixes, and a file that is none."""
    for i, name in enumerate(('b.png', 'a/2.JPG', 'a/1.bmp', 'c/d/3.jpeg', 'z.png')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / name), np.random.default_rng(i).integers(0, 255, (30, 20, 3), dtype=np.uint8))
    (tmp_path / 'a/readme.txt').write_text('no image')
    return tmp_path


def test_features_are_those_of_the_model(images):
    names = ['a/1.bmp', 'a/2.JPG', 'b.png', 'c/d/3.jpeg', 'z.png']
    model = build_model(load_config('config.py'))
    model.load_state_dict(torch.load('config.pth')['state_dict'])
    expected = features_by_hand(model, [images / name for name in names])
    assert np.abs(expected).max() > 0.1 and np.abs(expected[0] - expected[1]).max() > 1e-2
    for size in (2, 64):
        features, paths = extracted('config.py', 'config.pth', images, '--batch-size', size)
        assert paths == names and features.dtype == np.float32 and features.shape == (5, 32)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_features_of_denoised_and_fused_checkpoints(images):
    fuse_checkpoint('denoised.pth', 'fused.pth', overwrite=True)
    denoised, _ = extracted('denoised.py', 'denoised.pth', images)
    fused, _ = extracted('config.py', 'fused.pth', images)
    np.testing.assert_allclose(denoised, fused, rtol=1e-3, atol=1e-4)
    state = torch.load('denoised.pth')['state_dict']
    torch.save({key: value for key, value in state.items() if '.denoiser.' not in key}, 'plain.pth')
    plain, _ = extracted('config.py', 'plain.pth', images)
    assert np.abs(plain - fused).max() > 1e-2


def test_a_pipeline_without_a_loading_step_gets_one_and_an_unused_classifier_may_be_missing(images):
    expected, _ = extracted('config.py', 'config.pth', images)
    Path('loaded.py').write_text(
        "_base_ = './config.py'\ntest_dataloader = dict(dataset=dict(pipeline=_base_.pipeline[1:]))\n"
    )
    headless = with_state(lambda state: state.pop('head.classifier.weight'))
    for config, checkpoint in (('loaded.py', 'config.pth'), ('config.py', headless)):
        features, _ = extracted(config, checkpoint, images)
        assert np.array_equal(features, expected)


def with_state(change):
    state = torch.load('config.pth')['state_dict']
    change(state)
    torch.save(dict(state_dict=state), 'other.pth')
    return 'other.pth'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda s: s.pop('backbone.layers.1.ln1.bias'), 'other.pth has no backbone.layers.1.ln1.bias, 1 are missing'),
        (lambda s: s.update({'backbone.ln1.weight': torch.zeros(31)}), 'other.pth has no backbone.ln1.weight'),
        (lambda s: s['backbone.ln1.weight'].fill_(torch.nan), 'are not finite'),
    ],
)
def test_weights_that_are_missing_or_broken(change, text, images):
    text_of_tool = sentence('extract_features', 'config.py', with_state(change), images, 'no.npz', '--device', 'cpu')
    assert text in text_of_tool and f'the features of {images / "a/1.bmp"} and others' in text_of_tool
    assert not Path('no.npz').exists()


class Evil:
    """Runs code when it is read as a pickle."""

    def __reduce__(self):
        return os.mkdir, ('evil',)


def test_bad_input_of_the_features(images, tmp_path_factory):
    empty = tmp_path_factory.mktemp('empty')
    torch.save(Evil(), 'evil.pth')
    Path('there.npz').write_text('mine')
    head = "dict(_delete_=True, type='LinearClsHead', num_classes=2, in_channels=32)"
    Path('no_head.py').write_text(f"_base_ = './config.py'\nmodel = dict(head={head})\n")
    state = torch.load('config.pth')['state_dict']
    fc = {'head.fc.weight': torch.ones(2, 32), 'head.fc.bias': torch.ones(2)}
    torch.save({key: v for key, v in state.items() if not key.startswith('head.')} | fc, 'no_head.pth')
    (images / 'broken').mkdir()
    (images / 'broken/a.png').write_bytes((images / 'z.png').read_bytes()[:40])
    broken, good = images / 'broken', images / 'a'
    for config, checkpoint, folder, output, text in (
        ('config.py', 'config.pth', broken, 'no.npz', f'{broken / "a.png"} cannot be read'),
        ('config.py', 'config.pth', 'none', 'no.npz', 'none is not a folder'),
        ('config.py', 'config.pth', empty, 'no.npz', f'{empty} has no images (.bmp, '),
        ('config.py', 'config.pth', good, 'no.npy', 'no.npy must end with .npz'),
        ('config.py', 'config.pth', good, 'there.npz', 'there.npz exists'),
        ('none.py', 'config.pth', good, 'no.npz', 'the config none.py cannot be read'),
        ('config.py', 'none.pth', good, 'no.npz', 'the checkpoint none.pth does not exist'),
        ('config.py', 'evil.pth', good, 'no.npz', 'evil.pth can only be read by running code'),
        ('config.py', 'denoised.pth', good, 'no.npz', 'denoised.pth has denoisers and the config has none'),
        ('denoised.py', 'config.pth', good, 'no.npz', 'config.pth has no backbone.layers.0.ffn.layers.0.0.denoiser.'),
        ('no_head.py', 'no_head.pth', good, 'no.npz', 'the model of the config no_head.py predicts no pred_feature'),
    ):
        assert text in sentence('extract_features', config, checkpoint, folder, output, '--device', 'cpu')
    device = ['--device', 'nowhere']
    text = sentence('extract_features', 'config.py', 'config.pth', good, 'no.npz', *device)
    assert 'the device nowhere cannot be used' in text
    assert not Path('evil').exists() and not Path('no.npz').exists() and Path('there.npz').read_text() == 'mine'

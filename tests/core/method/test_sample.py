"""The random part of the vectors that a layer takes or gives."""

import pytest
import torch
from torch import nn

from helpers import relative
from mmdenoiserep.core import Moments
from mmdenoiserep.core.method.sample import Sample


def test_a_part_of_few_tokens_is_all_of_them():
    """No token is drawn twice, or left out, where there are no more than wanted."""
    layer, x = nn.Linear(8, 6), torch.randn(2, 5, 8)
    assert torch.equal(Sample(most=10)(layer, x), Sample()(layer, x))
    assert Sample(most=9)(layer, x).shape == (1, 8, 9)
    assert Sample(most=4)(nn.Conv2d(8, 6, 3), torch.zeros(0, 8, 5, 4)).shape == (1, 8, 0)


def test_the_pixels_that_are_drawn_differ_from_image_to_image():
    """A place in the image is no random sample: what lies there may be the same in all of them."""
    ramp = torch.arange(64.0).reshape(1, 1, 8, 8).expand(500, 1, 8, 8)
    moments = Moments.of(Sample()(nn.Conv2d(1, 2, 1), ramp, stride=8))
    assert moments.count == 500 * 8
    assert abs(moments.mean.item() - 31.5) < 1
    assert relative(moments.covariance.flatten(), ramp[0].var().reshape(1)) < 0.05


@pytest.mark.parametrize('stride', [1, 4])
def test_equally_many_tokens_of_each_image(stride):
    """Image after image, other tokens of each; where their number is not that of all images, from all of them."""
    layer, x = nn.Linear(1, 2), torch.arange(3 * 40.0).reshape(3, 40, 1)
    tokens = Sample(images=3)(layer, x, stride).flatten()
    assert len(tokens) == 3 * 40 // stride
    assert (tokens // 40).tolist() == [image for image in range(3) for _ in range(40 // stride)]
    if stride > 1:
        first, second, _ = (tokens % 40).split(10)
        assert not torch.equal(first, second)
    assert torch.equal(tokens, Sample(images=3)(layer, x.flatten(0, 1), stride).flatten())
    for images in (7, 0):
        sample = Sample(images=images)
        assert sample.parts(120) == 1 and sample(layer, x, stride).shape == (1, 1, 120 // stride)
    assert Sample(images=3).parts(120) == 3

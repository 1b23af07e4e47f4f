"""The random part of the vectors that a layer takes or gives."""

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

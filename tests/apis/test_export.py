"""image_shape: the size of the images, as it is given or left to the config."""

import pytest
from mmengine.config import Config
from torch import nn

from mmdenoiserep.apis.export import image_shape
from mmdenoiserep.core import InputError

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3))
CONFIG = Config(dict(model=dict(type='Model')))


@pytest.mark.parametrize(('size', 'expected'), [(None, (3, 224, 224)), (28, (3, 28, 28)), ([28, 30], (3, 28, 30))])
def test_the_size(size, expected):
    assert image_shape(CONFIG, MODEL, size) == expected


@pytest.mark.parametrize(
    ('size', 'words'),
    [
        ((28, 28, 1), r'size must be a height and a width, got \(28, 28, 1\)'),
        ((28,), 'size must be a height and a width'),
        (0, 'height must be a whole number of 1 or more, got 0'),
        ((28, -1), 'width must be a whole number of 1 or more, got -1'),
        ('28', "height must be a whole number of 1 or more, got '2'"),
    ],
)
def test_sizes_that_do_not_work(size, words):
    with pytest.raises(InputError, match=words):
        image_shape(CONFIG, MODEL, size)

"""extract_features: what it refuses before it builds a model."""

import pytest
from mmengine.config import Config

from mmdenoiserep.apis.features import extract_features
from mmdenoiserep.core import InputError


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(batch_size=0), 'batch_size must be a whole number of 1 or more, got 0'),
        (dict(images='nowhere'), 'nowhere is not a folder'),
        (dict(checkpoint='no.pth'), 'the checkpoint no.pth does not exist'),
        (dict(cfg='config.py'), 'cfg must be a Config'),
    ],
)
def test_arguments_that_do_not_work(arguments, words, tmp_path):
    path = tmp_path / 'in.pth'  # a path or a string
    path.touch()
    with pytest.raises(InputError, match=words):
        extract_features(**{**dict(cfg=Config({}), checkpoint=path, images=str(tmp_path)), **arguments})

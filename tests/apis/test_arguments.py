"""The checks of arguments: what passes, and the sentence for what does not."""

import numpy as np
import pytest
from mmengine.config import Config

from mmdenoiserep.apis.arguments import at_least, checkpoint_path, make_folder, one_of
from mmdenoiserep.apis.errors import config_path
from mmdenoiserep.core import InputError


@pytest.mark.parametrize(
    ('check', 'words'),
    [
        (lambda folder: at_least(1, images=0), 'images must be a whole number of 1 or more, got 0'),
        (lambda folder: at_least(1, images=None), 'images must be a whole number of 1 or more, got None'),
        (lambda folder: at_least(1, images=1.5), 'images must be a whole number of 1 or more, got 1.5'),
        (lambda folder: one_of((None, 'a'), part='b'), "part must be one of None, a, got 'b'"),
        (lambda folder: one_of(dict(a=1), part=['a']), r"part must be one of a, got \['a'\]"),
        (lambda folder: config_path('config.py'), 'cfg must be a Config, such as load_config returns, got a str'),
        (lambda folder: checkpoint_path(folder / 'no.pth'), 'no.pth does not exist'),
        (lambda folder: checkpoint_path(None), 'the checkpoint None does not exist'),
        (lambda folder: make_folder(folder / 'file' / 'new'), 'file/new cannot be written to: Not a directory'),
        (lambda folder: make_folder('/proc'), 'the folder /proc cannot be written to'),
    ],
)
def test_what_does_not_pass(check, words, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match=words):
        check(tmp_path)


def test_what_passes(tmp_path):
    at_least(0, images=np.int64(0))
    at_least(1, optional=True, images=None)
    one_of((None, 'a'), part=None, other='a')
    (tmp_path / 'a.pth').touch()
    assert checkpoint_path(tmp_path / 'a.pth') == str(tmp_path / 'a.pth')
    assert checkpoint_path('https://a.org/a.pth') == 'https://a.org/a.pth'
    assert config_path(Config(dict(a=1))) == 'in memory'
    make_folder(tmp_path / 'a/b')
    assert [path.name for path in (tmp_path / 'a').rglob('*')] == ['b']

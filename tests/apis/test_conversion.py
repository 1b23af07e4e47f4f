"""convert_file: what it refuses before it reads anything."""

import pytest

from mmdenoiserep.apis.conversion import convert_file
from mmdenoiserep.core import InputError


@pytest.mark.parametrize(
    ('kind', 'key', 'words'),
    [
        ('foo', None, "kind must be one of transreid, vmamba, plain, got 'foo'"),
        ('vmamba', 'model', "a file of the kind vmamba takes no key, got 'model'"),
    ],
)
def test_arguments_that_do_not_work(kind, key, words, tmp_path):
    with pytest.raises(InputError, match=words):
        convert_file(kind, tmp_path / 'in.pth', tmp_path / 'out.pth', key=key)

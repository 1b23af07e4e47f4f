"""draw_matches: what it refuses before it reads anything."""

import pytest
from mmengine.config import Config

from mmdenoiserep.apis.matches import draw_matches
from mmdenoiserep.core import InputError


@pytest.mark.parametrize('queries', [0, -1, None])
def test_numbers_of_queries_that_do_not_work(queries):
    with pytest.raises(InputError, match=f'queries must be a whole number of 1 or more, got {queries}'):
        draw_matches(Config({}), 'nowhere.json', queries)

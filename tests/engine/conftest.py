"""Fixtures of the tests that run a runner."""

import pytest

from engine_helpers import runner_case
from mmdenoiserep.engine.resume import allow_training_checkpoints


@pytest.fixture
def case():
    with runner_case() as case:
        yield case


@pytest.fixture
def resumable(clean_allow_list):
    """Lets mmengine resume from its own checkpoints."""
    allow_training_checkpoints()

"""Fixtures of the tests that run a runner."""

import pytest
import torch

from engine_helpers import runner_case
from mmdenoiserep.engine.resume import allow_training_checkpoints


@pytest.fixture
def case():
    with runner_case() as case:
        yield case


@pytest.fixture
def resumable():
    """Lets mmengine resume from its own checkpoints, for one test."""
    allowed = torch.serialization.get_safe_globals()
    allow_training_checkpoints()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)

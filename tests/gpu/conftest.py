"""What the tests of a device share: ``make test-gpu`` runs them on CUDA, all other runs on the CPU."""

import pytest
import torch

from engine_helpers import runner_case
from mmdenoiserep.core.utils.precision import without_tf32


@pytest.fixture
def device(pytestconfig):
    return torch.device(pytestconfig.getoption('--device'))


@pytest.fixture
def case():
    with runner_case() as case:
        yield case


@pytest.fixture
def full_precision():
    """For comparisons with the CPU."""
    with without_tf32():
        yield

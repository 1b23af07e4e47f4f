"""What the tests of a device share: ``make test-gpu`` runs them on CUDA, all other runs on the CPU."""

import pytest
import torch

from engine_helpers import runner_case


@pytest.fixture
def device(pytestconfig):
    return torch.device(pytestconfig.getoption('--device'))


@pytest.fixture
def case():
    with runner_case() as case:
        yield case

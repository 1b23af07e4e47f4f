"""Set-up of all tests."""

import pytest
import torch
from mmengine.registry import DefaultScope

torch.set_num_threads(1)  # small layers: threads cost more than they bring


@pytest.fixture(autouse=True)
def no_default_scope():
    """Lets every test start without a default scope; runs of earlier tests leave theirs behind."""
    DefaultScope._instance_dict.clear()

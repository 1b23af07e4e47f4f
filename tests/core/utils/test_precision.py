"""Without TF32 for a while: what the models of a comparison see, and what is left behind."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mmdenoiserep.core import compare_models
from mmdenoiserep.core.utils.precision import without_tf32


def settings():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture(params=['highest', 'high', 'medium'])
def product(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision('highest')


def test_the_settings_return(product):
    """Also after an interrupt."""
    with pytest.raises(KeyboardInterrupt), without_tf32():
        assert settings() == (False, 'highest')
        raise KeyboardInterrupt
    assert settings() == (True, product)


NEW_NAMES = """
import torch
from mmdenoiserep.core.utils.precision import without_tf32

conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
conv.fp32_precision, matmul.fp32_precision = {before!r}
with without_tf32():
    inside = conv.fp32_precision, matmul.fp32_precision
print('tf32' not in inside, (conv.fp32_precision, matmul.fp32_precision) == {before!r})
"""


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='torch 2.9 has the new names')
@pytest.mark.parametrize('before', [('tf32', 'tf32'), ('ieee', 'tf32'), ('ieee', 'ieee'), ('tf32', 'ieee')])
def test_programs_that_use_the_new_names(before):
    """In a process of their own, since the names exclude each other."""
    run = [sys.executable, '-W', 'ignore', '-c', NEW_NAMES.format(before=before)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == 'True True\n'


def test_models_are_compared_without_tf32(product):
    seen = []

    class Noting(nn.Linear):
        def forward(self, x):
            seen.append(settings())
            return super().forward(x)

    model = Noting(3, 3)
    assert compare_models(model, model, torch.randn(2, 3)).ok
    assert seen == [(False, 'highest')] * 2

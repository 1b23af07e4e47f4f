"""Products of float32 in float32 on GPUs that would round the factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Computes convolutions and matrix products of float32 in float32 inside the context.

    Recent GPUs round the factors of float32 convolutions to TF32, by 5e-4, which hides what folding changes. The
    settings are restored afterwards. torch 2.9 has new names for them, and refuses to read the old ones if a program
    has set the new ones.
    """
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    try:
        conv, product = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        precisions = cudnn.conv.fp32_precision, matmul.fp32_precision
        cudnn.conv.fp32_precision = matmul.fp32_precision = 'ieee'
        try:
            yield
        finally:
            cudnn.conv.fp32_precision, matmul.fp32_precision = precisions
        return
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        cudnn.allow_tf32 = conv
        torch.set_float32_matmul_precision(product)

"""What several test files use."""

import json
import random
from pathlib import Path

import torch
from torch import nn

from mmdenoiserep.core import DenoiseLayer
from mmdenoiserep.core.method.layers import convert_layer

ROOT = Path(__file__).resolve().parents[1]


def randomise(model, size=0.3, seed=0):
    """Gives every denoiser and every BatchNorm of a model random values that matter; returns the model."""
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor, scale, offset=0.0):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(noise * scale + offset)

    for module in model.modules():
        if isinstance(module, DenoiseLayer):
            for name, parameter in module.denoiser.named_parameters():
                fan_in = 1 if name in ('scale', 'bias') else parameter.shape[-1]
                normal_(parameter, size / fan_in**0.5 if name != 'down' else fan_in**-0.5)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            normal_(module.running_mean, 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            normal_(module.weight, 0.2, 1.0)
            normal_(module.bias, 0.2)
    return model


def denoised(layer, rank=None, bias=None, timestep=7, schedule=None, size=0.3):
    """Gives one Linear or Conv2d a random denoiser, in place, and returns it."""
    convert_layer(layer, timestep, schedule, rank, bias)
    return randomise(layer, size)


def dense(layer):
    """Returns B of a denoised layer as one (C, C) matrix."""
    return torch.block_diag(*layer.denoiser.matrix().detach())


def relative(actual, expected):
    """Returns the largest difference over the largest magnitude."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def equal(state, other):
    """Whether two dicts of tensors hold the same bits under the same names, in the same order."""
    return list(state) == list(other) and all(torch.equal(value, other[name]) for name, value in state.items())


def signature(state):
    """Returns the keys in order with shapes and dtypes."""
    return [(key, value.shape, value.dtype) for key, value in state.items()]


def copied(state):
    """Returns a state dict of copies."""
    return {key: value.detach().clone() for key, value in state.items()}


def random_states():
    """Returns the states of the generators of torch, Python and numpy."""
    import numpy as np  # the core's tests run without it

    return str(torch.get_rng_state().tolist()), random.getstate(), str(np.random.get_state())


def write_safetensors(path, state, metadata=None, padding=0):
    """Writes the format as its page describes it."""
    names = {torch.float32: 'F32', torch.float64: 'F64', torch.bfloat16: 'BF16', torch.int64: 'I64', torch.bool: 'BOOL'}
    header, data = {} if metadata is None else {'__metadata__': metadata}, b''
    for name, value in state.items():
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b''
        header[name] = dict(
            dtype=names[value.dtype], shape=list(value.shape), data_offsets=[len(data), len(data) + len(content)]
        )
        data += content
    text = json.dumps(header).encode() + b' ' * padding
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
    return path

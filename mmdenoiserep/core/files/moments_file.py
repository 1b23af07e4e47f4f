"""Reads and writes moments, for example of a training domain."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..utils.errors import CheckpointError
from .checkpoint import read_checkpoint, write_atomically

MOMENTS = 'moments'
"""Key of the moments in a file, beside ``meta``."""


def fingerprint(state: Mapping[str, Any]) -> str:
    """Returns a SHA-256 checksum of a state dict, which tells whether moments were collected with the same weights.

    Args:
        state: A state dict; values that are no tensors (``_extra_state``) are ignored.
    """
    checksum = hashlib.sha256()
    for name in sorted(name for name, value in state.items() if isinstance(value, Tensor)):
        value = state[name].detach().cpu().contiguous()
        checksum.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        checksum.update(value.flatten().view(torch.uint8).numpy())
    return checksum.hexdigest()


def save_moments(moments: Mapping[str, Moments], path: str | os.PathLike, meta: Mapping[str, Any]) -> None:
    """Writes moments atomically; an existing file is replaced.

    Stores the lower triangle of each covariance, C (C + 1) / 2 numbers for C channels, in float32: the rounding of 1e-7
    is far below the ridge of :func:`transport`.

    Args:
        moments: Moments by layer name.
        path: File to write.
        meta: Plain data to store with the moments.

    Raises:
        CheckpointError: The file can't be written.
    """
    layers = {}
    for name, seen in moments.items():
        rows, columns = torch.tril_indices(*seen.covariance.shape[1:], device='cpu')
        layers[name] = dict(
            count=torch.tensor(seen.count, device='cpu'),
            mean=seen.mean.cpu(),
            covariance=seen.covariance.cpu()[:, rows, columns].float(),
        )
    write_atomically({'meta': dict(meta), MOMENTS: layers}, Path(path))


def load_moments(path: str | os.PathLike) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Reads a file of :func:`save_moments` without running its code.

    Returns:
        The moments by layer name; ``meta``.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no moments.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get(MOMENTS), Mapping) or not isinstance(content.get('meta'), Mapping):
        raise CheckpointError(f'{path} holds no moments; write them with collect_moments and save_moments')
    moments = {}
    for name, layer in content[MOMENTS].items():
        try:
            moments[name] = _unpack(layer)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError) as error:
            raise CheckpointError(f'{path} holds no usable moments of {name} ({error})') from None
    return moments, dict(content['meta'])


def _unpack(layer: Mapping[str, Tensor]) -> Moments:
    mean, packed = layer['mean'], layer['covariance']  # (groups, size), (groups, size (size + 1) / 2)
    size = mean.shape[1]
    rows, columns = torch.tril_indices(size, size, device='cpu')
    covariance = torch.zeros(*mean.shape, size, dtype=torch.float64, device='cpu')
    covariance[:, rows, columns] = covariance[:, columns, rows] = packed.double()
    return Moments.from_state_dict(dict(count=layer['count'], mean=mean, scatter=covariance * layer['count']))

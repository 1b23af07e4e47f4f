"""Files of moments: those of a training domain, which later fits are carried to."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.moments import Moments
from .checkpoint import CheckpointError, read_checkpoint, write_atomically

KIND = 'moments'
"""Key of the moments in such a file, beside ``meta``."""


def fingerprint(state: Mapping[str, Any]) -> str:
    """Returns a checksum of names and values, by which moments know the weights that they were gathered with.

    Args:
        state: A state dict; what is no tensor in it (``_extra_state``) does not count.
    """
    checksum = hashlib.sha256()
    for name in sorted(name for name, value in state.items() if isinstance(value, Tensor)):
        value = state[name].detach().cpu().contiguous()
        checksum.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        checksum.update(value.flatten().view(torch.uint8).numpy())
    return checksum.hexdigest()


def save_moments(moments: Mapping[str, Moments], path: str | os.PathLike, meta: Mapping[str, Any]) -> None:
    """Writes moments by layer name, whole or not at all.

    A layer of C channels takes half of C^2 float32 numbers: the covariance is symmetric, and its rounding of 1e-7 is
    far below the ridge of :func:`transport`.

    Args:
        moments: Moments by layer name.
        path: File to write.
        meta: Plain data about them.

    Raises:
        CheckpointError: The folder or disk does not take the file.
    """
    layers = {}
    for name, seen in moments.items():
        rows, columns = torch.tril_indices(*seen.covariance.shape[1:], device='cpu')
        layers[name] = dict(
            count=torch.tensor(seen.count, device='cpu'),
            mean=seen.mean.cpu(),
            covariance=seen.covariance.cpu()[:, rows, columns].float(),
        )
    write_atomically({'meta': dict(meta), KIND: layers}, Path(path))


def load_moments(path: str | os.PathLike) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Reads what :func:`save_moments` wrote, without running any code of the file.

    Returns:
        The moments by layer name, and ``meta``.

    Raises:
        CheckpointError: The file is missing, damaged, or holds no moments.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get(KIND), Mapping) or not isinstance(content.get('meta'), Mapping):
        raise CheckpointError(f'{path} holds no moments; write them with collect_moments and save_moments')
    moments = {}
    for name, layer in content[KIND].items():
        try:
            moments[name] = _unpack(layer)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise CheckpointError(f'{path} holds no usable moments of {name} ({error})') from None
    return moments, dict(content['meta'])


def _unpack(layer: Mapping[str, Tensor]) -> Moments:
    mean, packed = layer['mean'], layer['covariance']
    size = mean.shape[1]
    rows, columns = torch.tril_indices(size, size, device='cpu')
    covariance = torch.zeros(*mean.shape, size, dtype=torch.float64, device='cpu')
    covariance[:, rows, columns] = covariance[:, columns, rows] = packed.double()
    return Moments.from_state_dict(dict(count=layer['count'], mean=mean, scatter=covariance * layer['count']))

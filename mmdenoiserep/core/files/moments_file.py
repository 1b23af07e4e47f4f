"""Reads and writes moments, for example of a training domain."""

import hashlib
import os
from collections.abc import Iterator, Mapping
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

    Stores the mean and the lower triangle of :meth:`Moments.root`, C (C + 1) / 2 numbers for C channels, in float32:
    the rounding of 1e-7 is far below the ridge. The covariance follows from the root, which a fit would otherwise have
    to find.

    Args:
        moments: Moments by layer name.
        path: File to write.
        meta: Plain data to store with the moments.

    Raises:
        CheckpointError: The file can't be written.
    """
    layers = {}
    for name, seen in moments.items():
        root = seen.root(torch.float32).cpu()
        rows, columns = torch.tril_indices(*root.shape[1:], device='cpu')
        layers[name] = dict(
            count=torch.tensor(seen.count, device='cpu'),
            mean=seen.mean.cpu(),
            root=root[:, rows, columns],
        )
    write_atomically({'meta': dict(meta), MOMENTS: layers}, Path(path))


def load_moments(path: str | os.PathLike) -> tuple['MomentsFile', dict[str, Any]]:
    """Reads a file of :func:`save_moments` without running its code.

    Returns:
        The moments by layer name; ``meta``.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no moments.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get(MOMENTS), Mapping) or not isinstance(content.get('meta'), Mapping):
        raise CheckpointError(f'{path} holds no moments; write them with collect_moments and save_moments')
    return MomentsFile(path, content[MOMENTS]), dict(content['meta'])


class MomentsFile(Mapping[str, Moments]):
    """The moments of a file by layer name; those of a layer are unpacked when they are asked for, and not kept.

    Args:
        path: Path of the file, for messages.
        packed: What it has of each layer.

    Raises:
        CheckpointError: When the moments of a layer are asked for that are damaged.
    """

    def __init__(self, path: str | os.PathLike, packed: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.path = path
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __contains__(self, name: object) -> bool:
        return name in self.packed

    def __getitem__(self, name: str) -> Moments:
        layer = self.packed[name]
        try:
            return _unpack(layer)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError) as error:
            raise CheckpointError(f'{self.path} holds no usable moments of {name} ({error})') from None


def _unpack(layer: Mapping[str, Tensor]) -> Moments:
    mean, packed = layer['mean'], layer['root']  # (groups, size), (groups, size (size + 1) / 2)
    count = int(layer['count'])
    size = mean.shape[1]
    rows, columns = torch.tril_indices(size, size, device='cpu')
    root = torch.zeros(*mean.shape, size, dtype=torch.float32, device='cpu')
    root[:, rows, columns] = root[:, columns, rows] = packed
    if count < 0 or not (mean.isfinite().all() and root.isfinite().all()):
        raise ValueError('NaN, Inf or a negative number of vectors')
    return Moments.from_root(count, mean, root)

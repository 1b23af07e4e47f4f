"""Files of moments: those of a training domain, which later fits are carried to."""

import hashlib
import os
from collections.abc import Iterator, Mapping
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

    Of a layer, the file has the mean and :meth:`Moments.root`, from which the covariance follows: a fit needs the root,
    and finding it takes as long as the rest of a fit. The root is symmetric, so C channels take half of C^2 float32
    numbers; their rounding of 1e-7 is far below the ridge.

    Args:
        moments: Moments by layer name.
        path: File to write.
        meta: Plain data about them.

    Raises:
        CheckpointError: The folder or disk does not take the file.
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
    write_atomically({'meta': dict(meta), KIND: layers}, Path(path))


def load_moments(path: str | os.PathLike) -> tuple['MomentsFile', dict[str, Any]]:
    """Reads what :func:`save_moments` wrote, without running any code of the file.

    Returns:
        The moments by layer name, and ``meta``.

    Raises:
        CheckpointError: The file is missing, damaged, or holds no moments.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get(KIND), Mapping) or not isinstance(content.get('meta'), Mapping):
        raise CheckpointError(f'{path} holds no moments; write them with collect_moments and save_moments')
    return MomentsFile(path, content[KIND]), dict(content['meta'])


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
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise CheckpointError(f'{self.path} holds no usable moments of {name} ({error})') from None


def _unpack(layer: Mapping[str, Tensor]) -> Moments:
    mean, packed, count = layer['mean'], layer['root'], int(layer['count'])
    size = mean.shape[1]
    rows, columns = torch.tril_indices(size, size, device='cpu')
    root = torch.zeros(*mean.shape, size, dtype=torch.float32, device='cpu')
    root[:, rows, columns] = root[:, columns, rows] = packed
    if count < 0 or not (mean.isfinite().all() and root.isfinite().all()):
        raise ValueError('NaN, Inf or a negative number of vectors')
    return Moments.from_root(count, mean, root)

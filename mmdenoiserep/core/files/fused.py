"""Fuses a checkpoint file: read, fuse, compare, write."""

import os
import statistics
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fusing.fuse import FusionError, fuse_with_changes
from ..utils.errors import CheckpointError, printable
from .atomic import check_output
from .checkpoint import write_atomically
from .content import Checkpoint, open_checkpoint

STAMP = 'denoiserep'
"""Key in ``meta`` that marks a fused file."""


@dataclass(frozen=True)
class FusedCheckpoint:
    """A fused checkpoint; ``print`` it for a summary of the changes.

    Attributes:
        weights: The vanilla state dict.
        meta: ``meta`` of the fused file.
        layers: By layer name, the relative change of the weight, ``|W' - W| / |W|`` (Frobenius norm).
        notes: Sentences about what was stripped or left out, and about weights that did not change.
    """

    weights: 'OrderedDict[str, Any]'
    meta: Mapping[str, Any]
    layers: Mapping[str, float]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        largest = max(self.layers, key=self.layers.__getitem__)
        return '\n'.join(
            [
                f'{len(self.layers)} layers fused; relative change of their weights: '
                f'median {statistics.median(self.layers.values()):.2e}, largest {self.layers[largest]:.2e} '
                f'({printable(largest)})',
                *(f'note: {printable(note)}' for note in self.notes),
            ]
        )


def fuse_checkpoint(
    source: str | os.PathLike, target: str | os.PathLike, *, overwrite: bool = False, allow_pickle: bool = False
) -> FusedCheckpoint:
    """Reads a checkpoint with denoisers and writes the fused, vanilla checkpoint atomically.

    The output holds ``meta`` and ``state_dict`` and loads with ``weights_only=True``. Its ``meta`` is the source's as
    plain data, with the config without denoising in ``meta['cfg']`` and the mark ``meta['denoiserep']``. The
    inferencers of the libraries need no other file.

    Args:
        source: Checkpoint with ``denoiser.*`` keys; prefixes of DDP and ``torch.compile`` are stripped.
        target: File to write.
        overwrite: Whether the target may exist.
        allow_pickle: See :func:`read_checkpoint`.

    Returns:
        What was written, and how it differs from the source.

    Raises:
        CheckpointError: The source can't be read or fused, or the target can't be written.
    """
    check_output(Path(target), overwrite, source=Path(source))
    fused = fuse_content(open_checkpoint(source, allow_pickle))
    write_atomically(dict(meta=fused.meta, state_dict=fused.weights), Path(target))
    return fused


def fuse_content(content: Checkpoint) -> FusedCheckpoint:
    """Folds the denoisers of a checkpoint into its weights; writes nothing.

    Args:
        content: The checkpoint; it is not changed.

    Raises:
        CheckpointError: The checkpoint is fused already, or can't be fused.
    """
    if STAMP in content.meta:
        raise CheckpointError(
            f'{content.source} is fused already (its meta says so); it loads into the vanilla config as it is'
        )
    try:
        weights, changes = fuse_with_changes(content.weights)
    except (FusionError, NotImplementedError) as error:  # float8 lacks most operations
        raise CheckpointError(f'{content.source} cannot be fused: {error}') from None
    vanilla = content.without_denoising()
    notes = vanilla.notes
    unchanged = sum(
        change == 0 and weights[f'{name}.weight' if f'{name}.weight' in weights else 'weight'].element_size() < 4
        for name, change in changes.items()
    )
    if unchanged:
        notes += (
            f'{unchanged} of {len(changes)} weights are stored in half precision and did not change: '
            'the correction is smaller than their rounding; fuse a float32 checkpoint instead',
        )
    meta = {**vanilla.meta, STAMP: dict(fused=True, layers=len(changes))}
    return FusedCheckpoint(weights, meta, changes, notes)

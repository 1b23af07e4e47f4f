"""Checkpoint files: reading those of strangers without running their code, fusing them, writing all or nothing."""

import errno
import os
import pickle
import re
import statistics
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, printable
from .files import whole_file
from .fuse import FusionError, fuse_state_dict

STAMP = 'denoiserep'
"""Key in the ``meta`` of a fused file."""


class CheckpointError(InputError):
    """A file that can't be read, fused or written."""


class Inert:
    """Stands in for classes and functions that training checkpoints refer to; does nothing with what it is given."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


INERT_GLOBALS = (
    'mmengine.logging.history_buffer.HistoryBuffer',
    'builtins.getattr',
    'numpy.ndarray',
    'numpy.dtype',
    'numpy._core.multiarray._reconstruct',
    'numpy._core.multiarray.scalar',
    'numpy.core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    '_codecs.encode',
    'argparse.Namespace',
)
"""What training checkpoints, mmengine's above all, name besides tensors and plain data: read as :class:`Inert`."""


@dataclass(frozen=True)
class FusedCheckpoint:
    """What :func:`fuse_checkpoint` wrote.

    Attributes:
        layers: Relative change of the weight, ``|W' - W| / |W|`` (Frobenius norm), by layer name.
        notes: Sentences about what was stripped, dropped or may surprise.
    """

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


def read_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> dict[str, Any]:
    """Reads a checkpoint file on the CPU.

    By default only tensors and plain data are read (``weights_only=True``); the pickled mmengine and numpy objects of a
    training checkpoint become inert placeholders, so no code of the file runs.

    Args:
        path: A file that ``torch.save`` wrote.
        allow_pickle: Reads any pickle, which runs code that the file brings; only for files you trust.

    Raises:
        CheckpointError: The file is missing, truncated, no checkpoint, or needs code.
    """
    path = Path(path)
    try:
        exists, is_file = path.exists(), path.is_file()
    except OSError as error:  # a name that is too long, a folder that is closed
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from None
    if not exists:
        raise CheckpointError(f'{path} does not exist')
    if not is_file:
        raise CheckpointError(f'{path} is not a file')
    try:
        mmap = zipfile.is_zipfile(path)
        with _only_inert_globals():
            checkpoint = torch.load(path, map_location='cpu', weights_only=not allow_pickle, mmap=mmap)
    except Exception as error:  # a damaged file may break the reader anywhere, and make it seek to impossible places
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from None
        needs_code = re.search(r'(?i)unsupported (?:global|class|type).*?([\w.]+\.\w+)', str(error))
        if isinstance(error, pickle.UnpicklingError) and needs_code:
            raise CheckpointError(
                f'{path} can only be read by running code that it brings ({needs_code[1]}); '
                'if you trust whoever made it, the tools that convert or fuse a checkpoint read it with --allow-pickle'
            ) from None
        raise CheckpointError(f'{path} is truncated or no PyTorch checkpoint; copy or download it again') from None
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint with a state_dict')
    return dict(checkpoint)


def fuse_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    check: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None,
) -> FusedCheckpoint:
    """Reads a checkpoint with denoisers and writes the vanilla one; the source is not changed.

    The output holds ``meta`` (plain data only, stamped ``meta['denoiserep']``) and ``state_dict``, and loads with
    ``weights_only=True``. It appears under its name when it is complete, or not at all.

    Args:
        source: Checkpoint with ``denoiser.*`` keys; prefixes of DDP and ``torch.compile`` are stripped.
        target: File to write.
        overwrite: Whether the target may exist.
        allow_pickle: See :func:`read_checkpoint`.
        check: Called with the denoised and the fused state dict before anything is written; what it raises stops that.

    Raises:
        CheckpointError: Anything that keeps the file from being read, fused or written.
    """
    source, target = Path(source), Path(target)
    check_target(source, target, overwrite)
    checkpoint = read_checkpoint(source, allow_pickle)
    notes: list[str] = []
    state, meta = split_checkpoint(checkpoint, source, notes)
    if STAMP in meta:
        raise CheckpointError(
            f'{source} is fused already (its meta says so); it loads into the vanilla config as it is'
        )
    if 'ema_state_dict' in checkpoint:
        notes.append('the run kept averaged weights (EMA); they are what its state_dict holds, and what was fused')
    changes: dict[str, float] = {}
    try:
        fused = fuse_state_dict(state, changes)
    except (FusionError, NotImplementedError) as error:  # float8 lacks most operations
        raise CheckpointError(f'{source} cannot be fused: {error}') from None

    unchanged = sum(
        change == 0 and fused[f'{name}.weight' if f'{name}.weight' in fused else 'weight'].element_size() < 4
        for name, change in changes.items()
    )
    if unchanged:
        notes.append(
            f'{unchanged} of {len(changes)} weights are stored in half precision and did not change: '
            'the correction is smaller than their rounding; fuse a float32 checkpoint instead'
        )
    if check:
        check(state, fused)
    meta[STAMP] = dict(fused=True, layers=len(changes))
    write_atomically(dict(meta=meta, state_dict=fused), target)
    return FusedCheckpoint(changes, tuple(notes))


def write_atomically(content: Any, target: Path) -> None:
    """Saves with ``torch.save`` under a temporary name in the same folder, then renames.

    The bytes depend on the content alone, not on the name or the time.

    Raises:
        CheckpointError: The folder or disk does not take the file; nothing is left behind.
    """
    try:
        with whole_file(target) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        reason = getattr(error, 'strerror', None) or 'the disk is full or took only a part of it'
        raise CheckpointError(f'{target} cannot be written: {reason}; nothing was left behind') from None


@contextmanager
def _only_inert_globals() -> Iterator[None]:
    """Lets ``torch.load`` know :data:`INERT_GLOBALS` and nothing else, whatever the process allows besides."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        stand_ins = [(Inert, name) for name in INERT_GLOBALS]
        settings = (OrderedDict, 'yacs.config.CfgNode')  # a dict, which only a dict can stand in for
        torch.serialization.add_safe_globals([*stand_ins, settings])  # type: ignore[list-item]
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuses a target that can't or must not be written, before anything is read.

    Raises:
        CheckpointError: The target is a folder, the source itself, there already, or in no folder.
    """
    try:
        if target.is_dir():
            raise CheckpointError(f'{target} is a folder; name the file to write, such as {target / "fused.pth"}')
        if target.exists():
            if source.exists() and target.samefile(source):
                raise CheckpointError(f'{target} is the input itself; name another file to write')
            if not overwrite:
                raise CheckpointError(f'{target} exists; name another file, or pass --overwrite')
        if not target.parent.is_dir():
            raise CheckpointError(f'the folder {target.parent} does not exist; create it first')
    except OSError as error:  # a name that is too long, a folder that is closed
        raise CheckpointError(f'{target} cannot be written: {error.strerror}') from None


def split_checkpoint(
    checkpoint: Mapping[str, Any], source: Path, notes: list[str]
) -> 'tuple[OrderedDict[str, Tensor], dict[str, Any]]':
    """Returns the weights of a checkpoint without the prefixes of wrappers, and what of its ``meta`` is plain data.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        source: Its path, for messages.
        notes: Gets a sentence about each thing that was stripped or left out.

    Raises:
        CheckpointError: There is no state dict.
    """
    meta = checkpoint.get('meta') if 'state_dict' in checkpoint else None
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    state = _clean_keys(checkpoint.get('state_dict', checkpoint), source, notes)
    kept = {key: value for key, value in meta.items() if type(key) is str and _is_plain(value)}
    if dropped := sorted({key if type(key) is str else 'keys that are no text' for key in meta if key not in kept}):
        notes.append(f'left out of meta, because it is no plain data: {", ".join(dropped)}')
    return state, kept


def _clean_keys(state: Any, source: Path, notes: list[str]) -> 'OrderedDict[str, Tensor]':
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f'{source} has no state_dict; its keys are not the names of parameters')
    others = sorted(key for key, value in state.items() if not _is_dense(value))
    if others or not state:
        raise CheckpointError(
            f'{source} has no state_dict, and {others[0] if others else "it"} holds no tensor of the usual, dense kind'
        )
    clean = OrderedDict((key.replace('_orig_mod.', ''), value) for key, value in state.items())
    if list(clean) != list(state):
        notes.append('stripped _orig_mod. (torch.compile) from the names')
    if all(key.startswith('module.') for key in clean):
        clean = OrderedDict((key.removeprefix('module.'), value) for key, value in clean.items())
        notes.append('stripped module. (DataParallel or DDP) from the names')
    if not notes and hasattr(state, '_metadata'):
        clean._metadata = state._metadata  # type: ignore[attr-defined]
    return clean


def _is_dense(value: Any) -> bool:
    """Whether a value is a tensor as large as its data in the file; with strides of zero it would seem of any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _is_plain(value: Any) -> bool:
    """Whether a value has plain data only, and not so deep that it can't be written again."""
    seen: set[int] = set()  # a file of a few bytes may hold one list at any number of places, or a list in itself

    def plain(value: Any, depth: int) -> bool:
        if value is None or type(value) in (str, int, float, bool) or id(value) in seen:
            return True
        seen.add(id(value))
        if type(value) not in (dict, OrderedDict, list, tuple) or depth > 100:
            return False
        items = [v for kv in value.items() for v in kv] if isinstance(value, dict) else value
        return all(plain(item, depth + 1) for item in items)

    return plain(value, 0)

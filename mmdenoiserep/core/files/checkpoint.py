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
from torch import Tensor, nn

from ..fusing.fuse import FusionError, fuse_state_dict
from ..utils.errors import CheckpointError, printable
from .atomic import whole_file
from .config_text import vanilla_text
from .file_kinds import describe_kind, is_safetensors, pickle_protocol, read_safetensors
from .plain import LEFT_OUT, is_dense, to_plain
from .stand_ins import STAND_INS, Inert

STAMP = 'denoiserep'
"""Key in the ``meta`` of a fused file."""

EXTRA_STATE = '_extra_state'
"""End of the names under which torch keeps what a module itself puts into a state dict, a tensor or not."""


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
    """Reads a checkpoint file on the CPU: one of ``torch.save``, or a safetensors file.

    By default only tensors and plain data are read (``weights_only=True``); the other objects of a training
    checkpoint, which :data:`~mmdenoiserep.core.files.stand_ins.STAND_INS` names, become inert placeholders, so no code
    of the file runs.

    Args:
        path: The file.
        allow_pickle: Reads any pickle, which runs code that the file brings; only for files you trust.

    Returns:
        The dict in the file; that of a safetensors file has its tensors under ``state_dict``.

    Raises:
        CheckpointError: The file is missing, truncated, no checkpoint, or needs code.
    """
    with _only_stand_ins():
        return load_file(path, allow_pickle=allow_pickle, mmap=True)


def load_file(
    path: str | os.PathLike, map_location: Any = 'cpu', *, allow_pickle: bool = False, mmap: bool = False
) -> dict[str, Any]:
    """Reads a file as :func:`read_checkpoint` does, with the globals that the process allows.

    Args:
        path: The file.
        map_location: See ``torch.load``.
        allow_pickle: See :func:`read_checkpoint`.
        mmap: Leaves the tensors on the disk until they are read; the file must stay as it is until then.

    Raises:
        CheckpointError: See :func:`read_checkpoint`.
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
        if is_safetensors(path):
            return dict(state_dict=read_safetensors(path))
        mmap = mmap and zipfile.is_zipfile(path)
        content = torch.load(path, map_location=map_location, weights_only=not allow_pickle, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may break the reader anywhere, and make it seek to impossible places
        raise CheckpointError(f'{path} {_reason(path, error, allow_pickle)}') from None
    if isinstance(content, nn.Module):
        raise CheckpointError(f'{path} holds a whole model ({type(content).__name__}); save its state_dict() instead')
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint with a state_dict')
    return content if isinstance(content, dict) else dict(content)  # a bare state dict knows its _metadata


def _reason(path: Path, error: Exception, allow_pickle: bool) -> str:
    """Returns why a file can't be read, and what to do, after its name."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f'cannot be read: {error.strerror or error}'
    needs_code = re.search(r'(?i)unsupported (?:global|class|type):? (?:global )?([\w.]+)', str(error))
    if isinstance(error, pickle.UnpicklingError) and needs_code:
        return (
            f'can only be read by running code that it brings ({needs_code[1]}); '
            'if you trust whoever made it, write a file that all tools take: '
            f'tools/convert_checkpoint.py plain {path} OUT --allow-pickle'
        )
    if allow_pickle and isinstance(error, ImportError | AttributeError):
        return f'needs what is not installed here: {error}'
    if kind := describe_kind(path):
        return kind
    if not allow_pickle and (protocol := pickle_protocol(path) or 0) > 2:
        return (
            f'was saved with pickle protocol {protocol}, which can only be read by running code that it brings; '
            'save it again without pickle_protocol, or if you trust whoever made it, write a file that all tools take: '
            f'tools/convert_checkpoint.py plain {path} OUT --allow-pickle'
        )
    return 'is truncated or no PyTorch checkpoint; copy or download it again'


def fuse_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    check: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None,
) -> FusedCheckpoint:
    """Reads a checkpoint with denoisers and writes the vanilla one; the source is not changed.

    The output holds ``meta`` and ``state_dict``, and loads with ``weights_only=True``. Its ``meta`` is that of the
    source as plain data, with the config without denoising in ``meta['cfg']`` and the stamp ``meta['denoiserep']``:
    the libraries' inferencers take such a file alone. It appears under its name when it is complete, or not at all.

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
    make_vanilla(meta, notes)
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
def _only_stand_ins() -> Iterator[None]:
    """Lets ``torch.load`` know :data:`STAND_INS` alone; what the process allows besides is inert."""
    allowed = torch.serialization.get_safe_globals()
    names = [entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}' for entry in allowed]
    stand_ins = {**dict.fromkeys(names, Inert), **STAND_INS}
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()])
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
    checkpoint: Mapping[str, Any], source: Path, notes: list[str], key: str | None = None
) -> 'tuple[OrderedDict[str, Any], dict[str, Any]]':
    """Returns the weights of a checkpoint without the prefixes of wrappers, and what of its ``meta`` is plain data.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        source: Its path, for messages.
        notes: Gets a sentence about each thing that was stripped or left out.
        key: Where the weights lie, such as ``'teacher'``; dots lead into dicts. None takes ``state_dict``, or the file
            itself, or the only dict of tensors in it, such as ``model``.

    Returns:
        Tensors by name, and ``_extra_state`` of any kind; ``meta``.

    Raises:
        CheckpointError: There is no state dict, or there are several.
    """
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    state = _clean_keys(find_weights(checkpoint, source, notes, key), source, notes)
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in meta.items():
        if type(name) is not str:
            left_out.append('keys that are no text')
        elif (plain := to_plain(value, name, left_out)) is not LEFT_OUT:
            kept[name] = plain
    if left_out:
        notes.append(f'left out of meta, because it is no plain data: {", ".join(sorted(set(left_out)))}')
    return state, kept


def make_vanilla(meta: dict[str, Any], notes: list[str]) -> None:
    """Replaces the config in the ``meta`` of a checkpoint by the one without denoising."""
    text = meta.get('cfg')
    if not isinstance(text, str):
        return
    try:
        meta['cfg'] = vanilla_text(text)
    except ValueError as error:
        del meta['cfg']
        notes.append(f'left out of meta: cfg, which cannot be read ({error}); give the inferencers a config file')


def find_weights(
    checkpoint: Mapping[str, Any], source: Path, notes: list[str], key: str | None = None
) -> Mapping[str, Any]:
    """Returns the state dict in a checkpoint; see :func:`split_checkpoint`.

    Raises:
        CheckpointError: There is none, or there are several.
    """
    if key is not None:
        found: Any = checkpoint
        for part in [key] if key in checkpoint else key.split('.'):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            raise CheckpointError(f'{source} has no {key}; it has {_first(checkpoint)}')
        return _weights_in(found)
    if 'state_dict' in checkpoint:
        return _weights_in(checkpoint['state_dict'])
    if _is_state(checkpoint):
        return checkpoint
    wrapped = [name for name, value in checkpoint.items() if isinstance(name, str) and _is_state(_weights_in(value))]
    if len(wrapped) == 1:
        notes.append(f'the weights lie under {wrapped[0]}')
        return _weights_in(checkpoint[wrapped[0]])
    if wrapped:
        raise CheckpointError(
            f'{source} has weights under {", ".join(wrapped)}; choose one of them with '
            f'tools/convert_checkpoint.py plain {source} OUT --key {wrapped[0]}'
        )
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint  # a state dict with something else in it
    raise CheckpointError(f'{source} has no state_dict, and no dict of tensors by name; it has {_first(checkpoint)}')


def _weights_in(value: Any) -> Any:
    return value.state_dict() if isinstance(value, nn.Module) else value


def _is_state(value: Any) -> bool:
    """Whether a value is a state dict: tensors by the names of parameters."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(item, Tensor) for key, item in value.items() if not key.endswith(EXTRA_STATE))
    )


def _first(names: Mapping[Any, Any]) -> str:
    first = ', '.join(map(str, list(names)[:5]))
    return f'{first}, ...' if len(names) > 5 else first or 'nothing'


def _clean_keys(state: Any, source: Path, notes: list[str]) -> 'OrderedDict[str, Any]':
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f'{source} has no state_dict; its keys are not the names of parameters')
    others = sorted(key for key, value in state.items() if not is_dense(value) and not key.endswith(EXTRA_STATE))
    if others or not state:
        raise CheckpointError(
            f'{source} has no state_dict, and {others[0] if others else "it"} holds no tensor of the usual, dense kind'
        )
    clean: OrderedDict[str, Any] = OrderedDict()
    left_out: list[str] = []
    for key, value in state.items():
        name = key.replace('_orig_mod.', '')
        if isinstance(value, Tensor):
            clean[name] = value
        elif (plain := to_plain(value, name, left_out)) is not LEFT_OUT:  # the state of a module, of any kind
            clean[name] = plain
    if left_out:
        notes.append(f'left out of the weights, because it is no plain data: {", ".join(left_out)}')
    if any('_orig_mod.' in key for key in state):
        notes.append('stripped _orig_mod. (torch.compile) from the names')
    if all(key.startswith('module.') for key in clean):
        clean = OrderedDict((key.removeprefix('module.'), value) for key, value in clean.items())
        notes.append('stripped module. (DataParallel or DDP) from the names')
    elif hasattr(state, '_metadata') and not any('_orig_mod.' in key for key in state):
        clean._metadata = state._metadata  # type: ignore[attr-defined]
    return clean

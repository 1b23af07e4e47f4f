"""Reads checkpoint files without running their code, and writes them."""

import errno
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.errors import CheckpointError
from .atomic import atomic_file
from .file_kinds import describe_kind, is_safetensors, pickle_protocol, read_safetensors
from .stand_ins import STAND_INS, Inert


def read_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> dict[str, Any]:
    """Reads a file of ``torch.save`` or a safetensors file on the CPU.

    By default no code of the file runs: tensors and plain data are read (``weights_only=True``), and placeholders of
    :data:`~mmdenoiserep.core.files.stand_ins.STAND_INS` replace the other objects of training checkpoints.

    Args:
        path: The file.
        allow_pickle: Whether to read any pickle, which runs code of the file; only for files you trust.

    Returns:
        The dict in the file. The tensors of a safetensors file are under ``state_dict``.

    Raises:
        CheckpointError: The file is missing, truncated or no checkpoint, or can only be read by running its code.
    """
    with _only_stand_ins():
        return load_file(path, allow_pickle=allow_pickle, mmap=True)


def load_file(
    path: str | os.PathLike, map_location: Any = 'cpu', *, allow_pickle: bool = False, mmap: bool = False
) -> dict[str, Any]:
    """Reads a file as :func:`read_checkpoint` does, but with the process's own ``torch.serialization`` safe globals.

    Args:
        path: The file.
        map_location: See ``torch.load``.
        allow_pickle: See :func:`read_checkpoint`.
        mmap: Maps the tensors into memory instead of reading them; the file must not change while they are used.

    Raises:
        CheckpointError: See :func:`read_checkpoint`.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f'{path} is not a file' if path.exists() else f'{path} does not exist')
        if is_safetensors(path):
            return dict(state_dict=read_safetensors(path))
        mmap = mmap and zipfile.is_zipfile(path)
        content = torch.load(path, map_location=map_location, weights_only=not allow_pickle, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may raise any error in the reader
        raise CheckpointError(f'{path} {_reason(path, error, allow_pickle)}') from None
    if isinstance(content, nn.Module):
        raise CheckpointError(f'{path} holds a whole model ({type(content).__name__}); save its state_dict() instead')
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint with a state_dict')
    return content if isinstance(content, dict) else dict(content)  # a bare state dict keeps its _metadata


def _reason(path: Path, error: Exception, allow_pickle: bool) -> str:
    """Returns the end of an error message: why a file can't be read, and what to do."""
    convert = (
        'if you trust whoever made it, write a file that all tools take: '
        f'tools/model_converters/convert_checkpoint.py plain {path} OUT --allow-pickle'
    )
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f'cannot be read: {error.strerror or error}'
    needs_code = re.search(r'(?i)unsupported (?:global|class|type):? (?:global )?([\w.]+)', str(error))
    if isinstance(error, pickle.UnpicklingError) and needs_code:
        return f'can only be read by running code that it brings ({needs_code[1]}); {convert}'
    if allow_pickle and isinstance(error, ImportError | AttributeError):
        return f'needs what is not installed here: {error}'
    if kind := describe_kind(path):
        return kind
    if not allow_pickle and (protocol := pickle_protocol(path) or 0) > 2:
        return (
            f'was saved with pickle protocol {protocol}, which can only be read by running code that it brings; '
            f'save it again without pickle_protocol, or {convert}'
        )
    return 'is truncated or no PyTorch checkpoint; copy or download it again'


def write_atomically(content: Any, target: Path) -> None:
    """Saves a file with ``torch.save``, atomically; equal contents give equal bytes.

    Args:
        content: What to save.
        target: File to write; an existing one is replaced.

    Raises:
        CheckpointError: The file can't be written; nothing is left behind.
    """
    try:
        with atomic_file(target) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        reason = getattr(error, 'strerror', None) or 'the disk is full or took only a part of it'
        raise CheckpointError(f'{target} cannot be written: {reason}; nothing was left behind') from None


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Makes :data:`STAND_INS` the safe globals of ``torch.load``, and the safe globals of the process inert."""
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

"""Finds the weights and ``meta`` in a checkpoint file."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..utils.errors import CheckpointError
from .checkpoint import read_checkpoint
from .config_text import vanilla_text
from .plain import LEFT_OUT, is_dense, to_plain

EXTRA_STATE = '_extra_state'
"""Suffix of the keys of ``nn.Module.get_extra_state``; their values need not be tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights and ``meta`` of a checkpoint file.

    Attributes:
        source: The file.
        weights: The state dict, whose keys have no prefixes of wrappers.
        meta: Plain data, see :func:`~.plain.to_plain`.
        notes: Sentences about what was stripped or left out.
    """

    source: Path
    weights: 'OrderedDict[str, Any]'
    meta: dict[str, Any]
    notes: tuple[str, ...]

    def without_denoising(self) -> 'Checkpoint':
        """Returns a copy whose ``meta['cfg']`` is the config without denoising."""
        text = self.meta.get('cfg')
        if not isinstance(text, str):
            return self
        meta, notes = dict(self.meta), self.notes
        try:
            meta['cfg'] = vanilla_text(text)
        except ValueError as error:
            del meta['cfg']
            notes += (f'left out of meta: cfg, which cannot be read ({error}); give the inferencers a config file',)
        return Checkpoint(self.source, self.weights, meta, notes)


def open_checkpoint(path: str | os.PathLike, allow_pickle: bool = False, key: str | None = None) -> Checkpoint:
    """Reads a checkpoint file and finds the weights in it.

    Args:
        path: The file.
        allow_pickle: See :func:`read_checkpoint`.
        key: Key of the weights, such as ``'teacher'``; dots separate the keys of nested dicts. None takes
            ``state_dict``, the file itself if it is a state dict, or else the only state dict in it, such as ``model``.

    Raises:
        CheckpointError: The file can't be read, or has no state dict or several.
    """
    source = Path(path)
    checkpoint = read_checkpoint(source, allow_pickle)
    notes: list[str] = []
    weights = _clean_state_dict(find_weights(checkpoint, source, notes, key), source, notes)
    given = checkpoint.get('meta')
    meta: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in given.items() if isinstance(given, Mapping) else ():
        if type(name) is not str:
            left_out.append('keys that are no text')
        elif (plain := to_plain(value, name, left_out)) is not LEFT_OUT:
            meta[name] = plain
    if left_out:
        notes.append(f'left out of meta, because it is no plain data: {", ".join(sorted(set(left_out)))}')
    if 'ema_state_dict' in checkpoint:
        notes.append('the run kept averaged weights (EMA); they are what its state_dict holds')
    return Checkpoint(source, weights, meta, tuple(notes))


def find_weights(
    checkpoint: Mapping[str, Any], source: Path, notes: list[str], key: str | None = None
) -> Mapping[str, Any]:
    """Returns the state dict in a checkpoint, see :func:`open_checkpoint`; ``notes`` gets an unusual key of it.

    Raises:
        CheckpointError: There is no state dict, or there are several.
    """
    if key is not None:
        found: Any = checkpoint
        for part in [key] if key in checkpoint else key.split('.'):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            raise CheckpointError(f'{source} has no {key}; it has {_names(checkpoint)}')
        return _unwrap(found)
    if 'state_dict' in checkpoint:
        return _unwrap(checkpoint['state_dict'])
    if _is_state_dict(checkpoint):
        return checkpoint
    wrapped = [name for name, value in checkpoint.items() if isinstance(name, str) and _is_state_dict(_unwrap(value))]
    if len(wrapped) == 1:
        notes.append(f'the weights lie under {wrapped[0]}')
        return _unwrap(checkpoint[wrapped[0]])
    if wrapped:
        raise CheckpointError(
            f'{source} has weights under {", ".join(wrapped)}; choose one of them with '
            f'tools/model_converters/convert_checkpoint.py plain {source} OUT --key {wrapped[0]}'
        )
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint  # a state dict with other values beside the tensors
    raise CheckpointError(f'{source} has no state_dict, and no dict of tensors by name; it has {_names(checkpoint)}')


def _unwrap(value: Any) -> Any:
    return value.state_dict() if isinstance(value, nn.Module) else value


def _is_state_dict(value: Any) -> bool:
    """Whether a value is a non-empty dict of tensors by name."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(item, Tensor) for key, item in value.items() if not key.endswith(EXTRA_STATE))
    )


def _names(names: Mapping[Any, Any]) -> str:
    first = ', '.join(map(str, list(names)[:5]))
    return f'{first}, ...' if len(names) > 5 else first or 'nothing'


def _clean_state_dict(state: Any, source: Path, notes: list[str]) -> 'OrderedDict[str, Any]':
    """Returns a state dict without the prefixes of wrappers, with plain extra states."""
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
        elif (plain := to_plain(value, name, left_out)) is not LEFT_OUT:  # extra state
            clean[name] = plain
    if left_out:
        notes.append(f'left out of the weights, because it is no plain data: {", ".join(left_out)}')
    if any('_orig_mod.' in key for key in state):
        notes.append('stripped _orig_mod. (torch.compile) from the names')
    if all(key.startswith('module.') for key in clean):
        clean = OrderedDict((key.removeprefix('module.'), value) for key, value in clean.items())
        notes.append('stripped module. (DataParallel or DDP) from the names')
    elif hasattr(state, '_metadata') and list(clean) == list(state):
        clean._metadata = state._metadata  # type: ignore[attr-defined]
    return clean

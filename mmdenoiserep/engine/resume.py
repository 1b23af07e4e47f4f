"""Lets mmengine read training checkpoints under torch 2.6 and newer, still without running foreign code."""

import dataclasses
import enum
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from ..core.files.checkpoint import load_file
from ..core.files.stand_ins import STAND_INS


def history_statistic(owner: type, name: str):
    """Stands in for ``getattr``, which a pickled HistoryBuffer asks for its four statistics; refuses all else.

    Raises:
        ValueError: The file asks for anything but a statistic of HistoryBuffer.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise ValueError(f'a checkpoint must not read {owner}.{name}')
    return getattr(HistoryBuffer, name)


# The functions that numpy pickles arrays and numbers with; their module has another name in each major version.
RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float64().__reduce__()[0]

AS_THEY_WERE = {
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'mmengine.config.config.ConfigDict': ConfigDict,
    'builtins.getattr': history_statistic,
    'numpy.ndarray': np.ndarray,
    'numpy.memmap': np.ndarray,
    'numpy.matrix': np.ndarray,
    'numpy.dtype': np.dtype,
    **{f'numpy.{core}.multiarray._reconstruct': RECONSTRUCT for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': SCALAR for core in ('core', '_core')},
}
"""Of what :data:`~mmdenoiserep.core.files.stand_ins.STAND_INS` names, what a resumed run needs as it was."""


def allow_training_checkpoints() -> None:
    """Lets this process read training checkpoints, mmengine's own and those that others released.

    It extends what ``torch.load(weights_only=True)`` accepts, and mmengine's ``load_from``, ``resume`` and
    ``init_cfg`` read local files and addresses as :func:`mmdenoiserep.core.read_checkpoint` does: safetensors files
    too, and with a sentence about a file that is none. Nothing on the list can run code of the file, so it may stay in
    force for files from others too.
    """
    kinds = {type(np.dtype(code)) for code in np.typecodes['All']}
    allowed = {**STAND_INS, **AS_THEY_WERE}
    torch.serialization.add_safe_globals([*kinds, *((value, name) for name, value in allowed.items())])
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    mmengine.runner.checkpoint.load_url = load_from_address  # of all schemes that download


def allow_plain_classes(modules: Iterable[str]) -> None:
    """Lets this process read the named tuples, enumerations and dataclasses of the user from checkpoints, as they were.

    The metainfo of a data set may have them. What reads files to fuse or to fit leaves them out.

    Args:
        modules: Names of modules of the user that are imported already (``custom_imports``); those in them count, too.
    """
    inside = tuple(f'{module}.' for module in modules)
    torch.serialization.add_safe_globals(
        [
            value
            for name, module in list(sys.modules.items())
            if f'{name}.'.startswith(inside)
            for value in list(vars(module).values())
            if isinstance(value, type)
            and value.__module__ == name
            and (issubclass(value, tuple | enum.Enum) or dataclasses.is_dataclass(value))
        ]
    )


def load_from_address(
    url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True
) -> dict[str, Any]:
    """Downloads a file once, to where torch keeps such files, and reads it as a local one.

    Args:
        url: Its address.
        model_dir: The folder for the file; None takes that of ``torch.hub``.
        map_location: See ``torch.load``.
        progress: Whether to show a bar.

    Raises:
        CheckpointError: See :func:`mmdenoiserep.core.read_checkpoint`.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / os.path.basename(urlsplit(url).path)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=progress)
    return load_from_local(str(path), map_location)


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Reads a local file for mmengine.

    Args:
        filename: Its path; ``~`` is the home.
        map_location: See ``torch.load``.

    Raises:
        CheckpointError: See :func:`mmdenoiserep.core.read_checkpoint`.
    """
    return load_file(os.path.expanduser(filename), map_location)

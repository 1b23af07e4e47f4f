"""Lets mmengine read its own training checkpoints under torch 2.6 and newer, still without running foreign code."""

from collections import OrderedDict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from numpy._core import multiarray


def history_statistic(owner: type, name: str):
    """Stands in for ``getattr``, which a pickled HistoryBuffer asks for its four statistics; refuses all else.

    Raises:
        ValueError: The file asks for anything but a statistic of HistoryBuffer.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise ValueError(f'a checkpoint must not read {owner}.{name}')
    return getattr(HistoryBuffer, name)


def allow_training_checkpoints() -> None:
    """Extends what ``torch.load(weights_only=True)`` accepts by what mmengine's files and some released ones hold.

    Since torch 2.6, ``--resume`` of mmengine 0.10.7 fails at ``HistoryBuffer`` otherwise. Nothing on the list can run
    code of the file, so it may stay in force for files from others too.
    """
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    arrays = [multiarray._reconstruct, multiarray.scalar]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (history_statistic, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *arrays,
            *((function, f'numpy.core.multiarray.{function.__name__}') for function in arrays),  # as numpy 1 names them
            *dtypes,
            (OrderedDict, 'yacs.config.CfgNode'),  # the settings in others' checkpoints, such as VMamba's: a dict
        ]
    )

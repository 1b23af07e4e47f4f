"""Inert replacements for the classes and functions that training checkpoints refer to.

To read a file for training or testing, ``mmdenoiserep.engine.resume`` replaces the entries of :data:`STAND_INS` that
mmengine needs by the originals.
"""

import argparse
import datetime
import pathlib
import struct
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any


class Inert:
    """Replaces classes and functions whose values no reader needs; ignores all arguments."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDtype:
    """Replaces ``numpy.dtype``.

    Attributes:
        code: Kind and size in bytes, such as ``'f8'``; for the kind ``'U'``, the length in characters.
        order: ``'<'``, ``'>'`` or ``'|'``.
    """

    def __init__(self, code: Any = '', *args: Any) -> None:
        self.code = code if isinstance(code, str) else ''
        self.order = '|'

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ('<', '>', '|'):
            self.order = state[1]


class InertArray:
    """Replaces ``numpy.ndarray``, so that arrays can be read without numpy."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tolist(self) -> Any:
        """Returns the values as nested lists.

        Raises:
            ValueError: The array is damaged or has a dtype that is no plain data.
        """
        try:
            _, shape, dtype, is_fortran, data = self.state
            values = data if dtype.code == 'O8' else _decode(dtype, data)
            if len(values) != prod(shape) or min(shape, default=1) < 0 or len(shape) > 64:
                raise ValueError(f'{len(values)} values do not fill the shape {shape}')
        except (TypeError, AttributeError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f'an array is damaged ({error})') from None
        strides = [prod(shape[:i]) if is_fortran else prod(shape[i + 1 :]) for i in range(len(shape))]
        return _nest(values, shape, strides) if values else []


STRUCT_FORMATS = dict(b1='?', i1='b', u1='B', i2='h', u2='H', i4='i', u4='I', i8='q', u8='Q', f2='e', f4='f', f8='d')
"""Format characters of the module ``struct`` by the code of a numpy dtype."""


def _decode(dtype: InertDtype, data: bytes) -> Sequence[Any]:
    """Returns the numbers or strings in the bytes of an array."""
    order = dtype.order.replace('|', '<')
    kind, size = dtype.code[:1], dtype.code[1:]
    if kind == 'U' and size.isdigit():
        width, encoding = 4 * int(size) or 1, 'utf-32-le' if order == '<' else 'utf-32-be'
        return [data[i : i + width].decode(encoding).rstrip('\0') for i in range(0, len(data), width)]
    if dtype.code not in STRUCT_FORMATS:
        raise ValueError(f'values of kind {dtype.code!r} are no plain data')
    return struct.unpack(f'{order}{len(data) // int(size)}{STRUCT_FORMATS[dtype.code]}', data)


def _nest(values: Sequence[Any], shape: Sequence[int], strides: Sequence[int], start: int = 0) -> Any:
    """Returns nested lists of a shape; item (i, j, ...) is ``values[start + i * strides[0] + j * ...]``."""
    if not shape:
        return values[start]
    return [_nest(values, shape[1:], strides[1:], start + i * strides[0]) for i in range(shape[0])]


def read_scalar(dtype: Any = None, data: Any = b'') -> Any:
    """Replaces numpy's ``scalar``; returns a Python number or string, or an :class:`Inert` if it can't."""
    try:
        (value,) = _decode(dtype, data)
    except (ValueError, TypeError, AttributeError, struct.error):
        return Inert()
    return value


DICTS = (
    'mmengine.config.config.ConfigDict',
    'mmcv.utils.config.ConfigDict',
    'addict.addict.Dict',
    'yacs.config.CfgNode',
    'fvcore.common.config.CfgNode',
    'detectron2.config.config.CfgNode',
    'easydict.EasyDict',
    'pytorch_lightning.utilities.parsing.AttributeDict',
    'lightning.pytorch.utilities.parsing.AttributeDict',
    'lightning.fabric.utilities.data.AttributeDict',
    'lightning_fabric.utilities.data.AttributeDict',
)
"""Subclasses of dict that hold settings; pickle needs a dict to add their entries to."""

INERT = (
    'mmengine.logging.history_buffer.HistoryBuffer',
    'mmengine.config.config.Config',
    'mmengine.config.lazy.LazyObject',
    'mmengine.config.lazy.LazyAttr',
    'mmcv.utils.config.Config',
    'builtins.getattr',
    'omegaconf.dictconfig.DictConfig',
    'omegaconf.listconfig.ListConfig',
    'omegaconf.base.Metadata',
    'omegaconf.base.ContainerMetadata',
    *(f'omegaconf.nodes.{kind}Node' for kind in ('Any', 'String', 'Integer', 'Float', 'Boolean', 'Bytes', 'Path')),
    'typing.Any',
    'decimal.Decimal',
    'fractions.Fraction',
    'uuid.UUID',
    'time.struct_time',
    're._compile',
    '_io.BytesIO',
    *(f'numpy.{kind}' for kind in ('bool', 'bool_', 'str_', 'float16', 'float32', 'float64')),
    *(f'numpy.{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)),
    *(f'numpy.random._pickle.__{kind}_ctor' for kind in ('randomstate', 'generator', 'bit_generator')),
    'numpy.random._mt19937.MT19937',
    'numpy.random._pcg64.PCG64',
    'numpy.random.bit_generator.SeedSequence',
    'numpy.random.bit_generator.__pyx_unpickle_SeedSequence',
    # factories of a defaultdict, or types; never called, because range(10**12) in a list would fill the memory
    *(f'builtins.{kind}' for kind in ('bool', 'int', 'float', 'str', 'list', 'tuple', 'dict', 'range', 'slice')),
)
"""Names whose values no reader needs."""

STAND_INS: Mapping[str, Callable] = {
    **dict.fromkeys(INERT, Inert),
    **dict.fromkeys(DICTS, OrderedDict),
    **{f'numpy.{kind}': InertArray for kind in ('ndarray', 'memmap', 'matrix')},
    'numpy.dtype': InertDtype,
    **{f'numpy.{core}.multiarray._reconstruct': InertArray for core in ('core', '_core')},  # numpy 1, numpy 2
    **{f'numpy.{core}.multiarray.scalar': read_scalar for core in ('core', '_core')},
    'collections.defaultdict': lambda *_: OrderedDict(),  # pickle adds the entries afterwards
    'collections.deque': lambda *_: [],
    'builtins.bytes': lambda *_: b'',  # pickle calls it for empty bytes; bytes(10**12) would fill the memory
    'builtins.frozenset': frozenset,
    'argparse.Namespace': argparse.Namespace,
    'types.SimpleNamespace': types.SimpleNamespace,
    'datetime.datetime': datetime.datetime,
    'datetime.date': datetime.date,
    'datetime.time': datetime.time,
    'datetime.timedelta': datetime.timedelta,
    'datetime.timezone': datetime.timezone,
    **{  # 'pathlib._local' is of Python 3.13; pure paths exist on every system
        f'{module}.{prefix}{system}Path': getattr(pathlib, f'Pure{system}Path')
        for module in ('pathlib', 'pathlib._local')
        for prefix in ('', 'Pure')
        for system in ('Posix', 'Windows')
    },
}
"""Replacements by full name, for ``torch.load(weights_only=True)``."""

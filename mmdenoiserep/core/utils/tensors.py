"""The tensors in what a model takes or returns, however they are packed."""

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLOSED = (
    str | bytes | bytearray | int | float | complex | torch.dtype | torch.device | torch.Size | nn.Module | type
    | types.FunctionType | types.MethodType | types.BuiltinFunctionType | types.ModuleType
)  # fmt: skip
"""What holds no tensors of an output, or not as its own."""


def named_tensors(value: Any, name: str = 'output') -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor in a value with its place, such as ``output[0]`` or ``output.pred_instances.scores``.

    Mappings, lists, tuples (named or not) and the attributes of any object are searched: dataclasses, mmengine's data
    elements, distributions. Sets are not, for they have no order. An object that stands in several places is searched
    in the first one.

    Args:
        value: The value.
        name: What its own place is called.
    """
    yield from _named(value, name, {})


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yields every tensor in some values, see :func:`named_tensors`."""
    for _, tensor in named_tensors(values):
        yield tensor


def _named(value: Any, name: str, seen: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif value is None or isinstance(value, CLOSED):
        return
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _named(item, f'{name}[{place}]', seen)
    elif id(value) not in seen:
        seen[id(value)] = value  # kept, or its id would be used again
        if isinstance(value, Mapping):
            for place, (key, item) in enumerate(value.items()):
                yield from _named(item, f'{name}[{key!r}]' if isinstance(key, str | int) else f'{name}[{place}]', seen)
        else:
            for key, item in _attributes(value):
                yield from _named(item, f'{name}.{key}', seen)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, '__dict__', {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get('__slots__', ())
        for key in [slots] if isinstance(slots, str) else slots:
            if key not in ('__dict__', '__weakref__') and hasattr(value, key):
                yield key, getattr(value, key)

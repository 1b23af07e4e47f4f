"""Finds the tensors in nested inputs and outputs of models, and joins tensors."""

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LEAF_TYPES = (
    str | bytes | bytearray | int | float | complex | torch.dtype | torch.device | torch.Size | nn.Module | type
    | types.FunctionType | types.MethodType | types.BuiltinFunctionType | types.ModuleType
)  # fmt: skip
"""Types that are not searched for tensors."""


def named_tensors(value: Any, name: str = 'output') -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor in a value with its path, such as ``output[0]`` or ``output.pred_instances.scores``.

    Searches mappings, lists, tuples and the attributes of any object (dataclasses, mmengine's data elements,
    distributions), but not sets, which have no order. An object with several paths is searched at the first one.

    Args:
        value: The value.
        name: Path of the value itself.
    """
    yield from _named(value, name, {})


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yields every tensor in some values, as :func:`named_tensors` does, without the paths."""
    for _, tensor in named_tensors(values):
        yield tensor


def join(tensors: list[Tensor]) -> Tensor:
    """Concatenates tensors along the first dimension; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _named(value: Any, name: str, seen: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif value is None or isinstance(value, LEAF_TYPES):
        return
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _named(item, f'{name}[{index}]', seen)
    elif id(value) not in seen:
        seen[id(value)] = value  # a reference, so that the id is not reused
        if isinstance(value, Mapping):
            for index, (key, item) in enumerate(value.items()):
                yield from _named(item, f'{name}[{key!r}]' if isinstance(key, str | int) else f'{name}[{index}]', seen)
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

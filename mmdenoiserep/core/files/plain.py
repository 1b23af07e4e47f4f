"""Converts the content of a file to plain data, which can be read without code of a library."""

import argparse
import collections
import datetime
import pathlib
import types
from typing import Any

import torch
from torch import Tensor

from .stand_ins import InertArray

MAX_DEPTH = 100
"""Largest depth of nested containers; pickle can't write much deeper ones."""

LEFT_OUT = object()
"""Stands for a value that has no plain form."""


def is_dense(value: Any) -> bool:
    """Whether a value is a dense tensor no larger than its storage; an expanded one could claim any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def to_plain(value: Any, name: str, left_out: list[str]) -> Any:
    """Converts a value to plain data, recursively.

    Subclasses of dict and namespaces become dicts, arrays become nested lists, sets become sorted lists (equal sets
    give equal files), paths, dates and dtypes become strings. Dense tensors stay tensors.

    Args:
        value: A value in a checkpoint.
        name: Name of the value.
        left_out: Gets the dotted name of each item that has no plain form. A list with such an item is left out whole.

    Returns:
        The plain value, or :data:`LEFT_OUT`.
    """
    return _Converter(left_out).convert(value, name, 0)


class _Converter:
    def __init__(self, left_out: list[str]) -> None:
        self.left_out = left_out
        # by id, the value and its plain form, which is computed once: a small file may hold one list in many places
        self.done: dict[int, tuple[Any, Any]] = {}

    def convert(self, value: Any, name: str, depth: int) -> Any:
        if id(value) not in self.done:
            self.done[id(value)] = value, LEFT_OUT  # for a value that contains itself; holding it keeps its id unique
            self.done[id(value)] = value, self._convert(value, name, depth)
        plain = self.done[id(value)][1]
        if plain is LEFT_OUT and name not in self.left_out:
            self.left_out.append(name)
        return plain

    def _convert(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, bytes) and not value:
            return LEFT_OUT  # torch.load can't read it with weights_only
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return value
        if depth > MAX_DEPTH:
            return LEFT_OUT
        if isinstance(value, str):
            return str.__str__(value)
        for kind in (int, float, complex, bytes):  # subclasses, such as numpy's float64 and enums
            if isinstance(value, kind):
                return kind(value)  # type: ignore[arg-type]
        if isinstance(value, argparse.Namespace | types.SimpleNamespace):
            return self._convert(vars(value), name, depth)
        if isinstance(value, dict):
            return self._convert_dict(value, name, depth)
        if isinstance(value, list | tuple | set | frozenset | collections.deque):
            return self._convert_items(value, name, depth)
        if isinstance(value, pathlib.PurePath | datetime.date | datetime.time | datetime.timedelta | datetime.tzinfo):
            return str(value)
        if isinstance(value, torch.dtype | torch.device):
            return str(value)
        if isinstance(value, Tensor):
            return value.detach() if is_dense(value) else LEFT_OUT
        if isinstance(value, InertArray) or type(value).__module__.partition('.')[0] == 'numpy':
            try:
                return self.convert(value.tolist(), name, depth)
            except (ValueError, AttributeError):
                return LEFT_OUT
        return LEFT_OUT

    def _convert_dict(self, value: dict, name: str, depth: int) -> Any:
        plain, before = {}, len(self.left_out)
        for key, item in dict.items(value):  # not the method of a subclass, which may build lazy objects
            key = key if isinstance(key, tuple) else self.convert(key, f'keys of {name}', depth + 1)
            if not _is_key(key):
                self.left_out.append(f'keys of {name}')
            elif (item := self.convert(item, f'{name}.{key}', depth + 1)) is not LEFT_OUT:
                plain[key] = item
        if value and not plain:
            del self.left_out[before:]
            return LEFT_OUT
        return plain

    def _convert_items(self, value: Any, name: str, depth: int) -> Any:
        before = len(self.left_out)
        items = [self.convert(item, f'{name}[{i}]', depth + 1) for i, item in enumerate(value)]
        if any(item is LEFT_OUT for item in items):
            del self.left_out[before:]
            return LEFT_OUT
        if isinstance(value, set | frozenset):
            return sorted(items, key=repr)
        return tuple(items) if isinstance(value, tuple) else items


def _is_key(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return key is None or type(key) in (bool, int, float, str) or (type(key) is bytes and bool(key))

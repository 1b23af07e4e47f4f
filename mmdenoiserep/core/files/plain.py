"""Plain data: what every reader of a file understands, without code of the file or a library."""

import argparse
import collections
import datetime
import pathlib
import types
from typing import Any

import torch
from torch import Tensor

from .stand_ins import InertArray

DEPTH = 100
"""Containers within containers; deeper ones could not be written again."""


class _LeftOut:
    pass


LEFT_OUT = _LeftOut()


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor as large as its data in the file; with strides of zero it would seem of any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def to_plain(value: Any, name: str, left_out: list[str]) -> Any:
    """Returns a value as plain data, item by item.

    Dicts of all kinds and namespaces become dicts, arrays become nested lists, sets become sorted lists (so that a
    file does not depend on the order of a set), paths and dates become text; dense tensors stay.

    Args:
        value: What a checkpoint holds.
        name: What it is called there.
        left_out: Gets the dotted name of each item that is no plain data. A list that holds one is left out whole.

    Returns:
        The plain value, or :data:`LEFT_OUT`.
    """
    return _Cleaner(left_out).convert(value, name, 0)


class _Cleaner:
    def __init__(self, left_out: list[str]) -> None:
        self.left_out = left_out
        # a file of a few bytes may hold one list at any number of places, or a list in itself
        self.done: dict[int, tuple[Any, Any]] = {}

    def convert(self, value: Any, name: str, depth: int) -> Any:
        if id(value) not in self.done:
            self.done[id(value)] = value, LEFT_OUT  # as long as it is open; the value is held, so that its id is too
            self.done[id(value)] = value, self._convert(value, name, depth)
        plain = self.done[id(value)][1]
        if plain is LEFT_OUT and name not in self.left_out:
            self.left_out.append(name)
        return plain

    def _convert(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, bytes) and not value:
            return LEFT_OUT  # the only plain value that torch can't read with weights_only
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return value
        if depth > DEPTH:
            return LEFT_OUT
        if isinstance(value, str):
            return str.__str__(value)
        for kind in (int, float, complex, bytes):  # numbers of numpy and enumerations are subclasses of these
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
        for key, item in dict.items(value):  # lazy stays lazy
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

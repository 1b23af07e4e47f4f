"""What is known of a batch without knowing the model: the number of its images."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from .moments import CalibrationError


class _Count(NamedTuple):
    """A candidate for the number of images; arrays go before lists, and large ones before small ones."""

    is_array: bool
    elements: int
    images: int


def count_images(batch: Any) -> int:
    """Returns how many images a batch holds.

    That is the length of its largest array, for scalars, masks and scale factors are smaller than images; of a list of
    images, (C, H, W) each, it is the length of the list. A batch without arrays counts by its largest list.

    Args:
        batch: An array (images, ...), or dicts, lists, tuples and dataclasses that hold some.

    Raises:
        CalibrationError: The batch holds no array and no list.
    """
    counts = list(_counts(batch))
    if not counts:
        raise CalibrationError(
            f'a batch ({type(batch).__name__}) holds no tensor, array or list to count its images by; '
            'hand over batches that hold one'
        )
    return max(counts, key=lambda count: count[:2]).images  # the first of equals


def _counts(value: Any) -> Iterator[_Count]:
    """Yields the counts of every array and list in a nested value."""
    if hasattr(value, 'shape') and not isinstance(value, type):
        if len(value.shape):
            yield _Count(True, math.prod(value.shape), value.shape[0])
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _counts(item)
    elif isinstance(value, list) and value and all(len(getattr(item, 'shape', ())) == 3 for item in value):
        yield _Count(True, sum(math.prod(item.shape) for item in value), len(value))
    elif isinstance(value, list | tuple):
        inner = [count for item in value for count in _counts(item)]
        if any(count.is_array for count in inner) or isinstance(value, tuple):
            yield from inner
        else:
            yield _Count(False, sum(count.elements for count in inner) or len(value), len(value))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _counts(getattr(value, field.name))

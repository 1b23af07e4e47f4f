"""Whose memory a tensor lies in: that of a parameter, of a view of it, of another parameter that is tied to it."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Owner = TypeVar('Owner')


class Storages(Generic[Owner]):
    """The memory of some tensors.

    Args:
        tensors: Owners and their tensors; what is no tensor, or has no memory yet, is left out.

    Attributes:
        held: Tensors and their owners, by :func:`storage_of`.
    """

    def __init__(self, tensors: Iterable[tuple[Owner, Any]]) -> None:
        self.held: dict[int, list[tuple[Tensor, Owner]]] = defaultdict(list)
        for owner, tensor in tensors:
            if isinstance(tensor, Tensor) and not is_lazy(tensor):
                self.held[storage_of(tensor)].append((tensor, owner))

    def owners(self, tensor: Tensor) -> list[Owner]:
        """Returns the owners of the memory that a tensor lies in."""
        return [owner for held, owner in self.held.get(storage_of(tensor), ()) if overlap(held, tensor)]


def shared_parameters(module: nn.Module) -> set[int]:
    """Returns, by ``id``, the parameters that several modules hold, or whose memory others have a part in."""
    tensors = (t for part in module.modules() for t in (*part._parameters.values(), *part._buffers.values()))
    shared = set()
    for held in Storages((None, tensor) for tensor in tensors).held.values():
        for (one, _), (other, _) in itertools.combinations(held, 2):
            if overlap(one, other):
                shared |= {id(one), id(other)}
    return shared


def storage_of(tensor: Tensor) -> int:
    """Returns the address of the memory that a tensor is a part of; where it has none, a number of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and other kinds without memory of their own
        return -id(tensor)


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same storage have an element in common; parts of one flat buffer have none."""
    if one is other:
        return True
    if storage_of(one) != storage_of(other) or not one.numel() or not other.numel():
        return False
    (start, end), (other_start, other_end) = _extent(one), _extent(other)
    if end <= other_start or other_end <= start:
        return False
    if one.dtype != other.dtype or (one.is_contiguous() and other.is_contiguous()):
        return True
    used = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool, device='cpu')
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the first byte of a tensor and the one behind its last, in its storage."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(steps + 1) * tensor.element_size()

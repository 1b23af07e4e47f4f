"""Finds tensors that share memory: views of a parameter, and parameters that are tied to each other."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Owner = TypeVar('Owner')


class Storages(Generic[Owner]):
    """Tensors and their owners, indexed by storage.

    Args:
        tensors: Pairs of an owner and its tensor; values that are no tensors, and lazy parameters, are ignored.

    Attributes:
        held: Pairs of a tensor and its owner, by :func:`storage_of` the tensor.
    """

    def __init__(self, tensors: Iterable[tuple[Owner, Any]]) -> None:
        self.held: dict[int, list[tuple[Tensor, Owner]]] = defaultdict(list)
        for owner, tensor in tensors:
            if isinstance(tensor, Tensor) and not is_lazy(tensor):
                self.held[storage_of(tensor)].append((tensor, owner))

    def owners(self, tensor: Tensor) -> list[Owner]:
        """Returns the owners whose tensors share elements with a tensor."""
        return [owner for held, owner in self.held.get(storage_of(tensor), ()) if overlap(held, tensor)]


def shared_parameters(module: nn.Module) -> set[int]:
    """Returns the ``id`` of every parameter that several modules hold, or that shares memory with another tensor."""
    tensors = (t for part in module.modules() for t in (*part._parameters.values(), *part._buffers.values()))
    shared = set()
    for held in Storages((None, tensor) for tensor in tensors).held.values():
        for (one, _), (other, _) in itertools.combinations(held, 2):
            if overlap(one, other):
                shared |= {id(one), id(other)}
    return shared


def storage_of(tensor: Tensor) -> int:
    """Returns the address of a tensor's storage, or a unique negative number for a tensor without one."""
    try:
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors and other kinds without a storage
        return -id(tensor)


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an element in common; disjoint views of one storage have none."""
    if one is other:
        return True
    if storage_of(one) != storage_of(other) or not one.numel() or not other.numel():
        return False
    (start, end), (other_start, other_end) = _extent(one), _extent(other)
    if end <= other_start or other_end <= start:
        return False
    if one.dtype != other.dtype or (one.is_contiguous() and other.is_contiguous()):
        return True
    if one.is_contiguous() and start <= other_start and other_end <= end:
        return True  # as the transpose of a weight
    used = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool, device='cpu')
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the range of bytes that a tensor spans in its storage; the end is exclusive."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(last + 1) * tensor.element_size()

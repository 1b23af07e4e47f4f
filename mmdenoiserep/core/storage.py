"""Whose memory a tensor lies in: that of a parameter, of a view of it, of another parameter that is tied to it."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn


class Storages:
    """The memory of some tensors.

    Args:
        tensors: Names of owners and their tensors; None is left out.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        self.ranges: dict[int, list[tuple[int, int, str]]] = {}
        for name, tensor in tensors:
            if tensor is not None and (place := _place(tensor)):
                storage, start, end = place
                self.ranges.setdefault(storage, []).append((start, end, name))

    def owners(self, tensor: Tensor) -> list[str]:
        """Returns the owners of the memory that a tensor lies in."""
        if not self.ranges or not (place := _place(tensor)):
            return []
        storage, start, end = place
        return [name for first, last, name in self.ranges.get(storage, ()) if first < end and start < last]


def shared_memory(module: nn.Module, tensors: Iterable[tuple[str, Tensor | None]]) -> set[str]:
    """Returns the owners of tensors whose memory a second parameter or buffer of the model lies in.

    Args:
        module: The model.
        tensors: Names of owners and their parameters or buffers.
    """
    tensors = list(tensors)
    storages = Storages((str(place), tensor) for place, (_, tensor) in enumerate(tensors))
    holders: Counter[str] = Counter()
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                holders.update(storages.owners(tensor))
    return {tensors[int(place)][0] for place, count in holders.items() if count > 1}


def _place(tensor: Tensor) -> tuple[int, int, int] | None:
    """Returns address of the storage, first byte and end; None where there is none (sparse, meta, empty)."""
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    if not storage or not tensor.numel():
        return None
    start = int(tensor.storage_offset()) * tensor.element_size()
    span = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return storage, start, start + int(span) * tensor.element_size()

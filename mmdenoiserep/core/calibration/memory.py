"""How much memory a forward holds while it waits at a layer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..method.layers import Layer
from ..method.probe import evaluating, run_model
from ..method.sample import Sample
from ..utils.intercept import intercepting
from ..utils.storage import storage_of
from ..utils.tensors import tensors_in
from .collect import Stride, stride_of
from .features import Features


def paused_bytes(module: nn.Module, layers: Mapping[str, Layer], image: Tensor, stride: Stride = 1) -> int:
    """Returns the size of all tensors that a forward has made and holds when a fit pauses it, at the largest layer.

    Args:
        module: The model.
        layers: The layers by name.
        image: What to call the module with, one image; it counts too.
        stride: One in so many vectors of a layer is sampled, see :func:`collect_moments`; the sample counts.
    """
    largest = 0
    image = image.clone()  # not the memory of the batch that it is a part of
    live = _LiveStorages([*module.parameters(), *module.buffers()])
    live.add(image)

    def note(name: str, forward: Callable, *args: Any, **keywords: Any) -> Any:
        nonlocal largest
        (x,) = (*args, *keywords.values())
        vectors = Features(layers[name]).vectors(Sample(), x, stride_of(stride, name))
        largest = max(largest, live.bytes())
        del vectors
        return forward(*args, **keywords)

    with evaluating(module), intercepting(layers, note), live:
        run_model(module, image)
    return max(largest, live.bytes(), 1)


class _LiveStorages(TorchDispatchMode):
    """Follows the memory that operations make.

    Args:
        known: Tensors whose memory does not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {storage_of(tensor) for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, tensor: Tensor) -> None:
        place = storage_of(tensor)
        if place > 0 and place not in self.known:
            storage = tensor.untyped_storage()
            self.storages[place] = StorageWeakRef(storage), storage.nbytes()

    def bytes(self) -> int:
        """Returns the size of what is still held."""
        self.storages = {place: entry for place, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.add(tensor)
        return result

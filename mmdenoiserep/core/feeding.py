"""Which layer's output is read by one other layer alone, seen in one run on a dummy image."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .probe import evaluating, tensors_in


def find_sole_readers(module: nn.Module, layers: Mapping[str, nn.Module], example_input: Any) -> dict[str, str]:
    """Returns pairs of layers of which the second reads nothing but the output of the first, and alone reads it.

    A constant that is added to such an output can as well be taken off inside the reader. Names play no part: every
    operation that takes an output is watched, and must run inside the forward of the same reader.

    Args:
        module: The model, run in eval mode without gradients; it is left as it was.
        layers: Layers by name: those whose output is followed, and those that may read it.
        example_input: What to call the module with.

    Returns:
        Name of the first layer: name of its reader.
    """
    watch = _OutputWatch()
    replaced = {layer: layer.__dict__['forward'] for layer in layers.values() if 'forward' in layer.__dict__}
    try:
        for name, layer in layers.items():
            layer.forward = partial(watch.run, name, layer.forward)
        with watch, evaluating(module):
            for value in tensors_in(module(example_input)):
                watch.note(value, None)
    finally:
        for layer in layers.values():
            layer.__dict__.pop('forward', None)
        for layer, forward in replaced.items():
            layer.forward = forward
    pairs = {}
    for name, readers in watch.readers.items():
        (reader, *others) = readers
        if not others and reader is not None and watch.sources[reader] == {name}:
            pairs[name] = reader
    return pairs


class _OutputWatch(TorchDispatchMode):
    """Notes for every output of a watched layer in whose forward it is read; None stands for outside of them all.

    Attributes:
        readers: Name of a layer: names of those whose forward reads its output.
        sources: Name of a layer: names of those whose output is its first argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors too, or their ids would be used again
        self.readers: dict[str, set[str | None]] = defaultdict(set)
        self.sources: dict[str, set[str | None]] = defaultdict(set)
        self.running: list[str | None] = [None]

    def run(self, name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of a layer."""
        source, _ = self.outputs.get(id(args[0]) if args else 0, (None, None))
        self.sources[name].add(source)
        self.running.append(name)
        try:
            output = forward(*args, **kwargs)
        finally:
            self.running.pop()
        if isinstance(output, Tensor):
            self.outputs[id(output)] = name, output
        return output

    def note(self, value: Tensor, reader: str | None) -> None:
        """Notes that a tensor is read."""
        if id(value) in self.outputs:
            self.readers[self.outputs[id(value)][0]].add(reader)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tensors_in(args, kwargs or {}):
            self.note(value, self.running[-1])
        return func(*args, **(kwargs or {}))

"""Which layer's output is read by one other layer alone, seen while a model runs."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..method.probe import evaluating, run_model, tensors_in
from ..utils.intercept import intercepting
from ..utils.storage import Storages
from .moments import gather_processes


def find_sole_readers(module: nn.Module, layers: Mapping[str, nn.Module], example_input: Any) -> dict[str, str]:
    """Returns :meth:`Readers.pairs` of one run in eval mode, without gradients; the model is left as it was.

    Args:
        module: The model.
        layers: Layers by name: those whose output is followed, and those that may read it.
        example_input: What to call the module with.
    """
    readers = Readers(layers)
    with evaluating(module), readers.watching():
        readers.run(module, example_input)
    return readers.pairs()


class Readers:
    """Who reads the outputs of layers, in all runs together.

    A constant that is added to the output of a layer can as well be taken off inside a reader, if nothing else reads
    that output, and the reader reads nothing else. Names play no part: every operation that takes an output is watched,
    and must run inside the forward of the same reader. An output that is still held when the model has returned (inside
    of what it returned, by the model or by a hook) is taken as read by somebody else.

    Args:
        layers: Layers by name: those whose output is followed, and those that may read it.
        owned: Names of layers and tensors that only these may read.

    Attributes:
        read_elsewhere: Names of the layers of which such a tensor was read outside of their forward.
    """

    def __init__(self, layers: Mapping[str, nn.Module], owned: Iterable[tuple[str, Tensor | None]] = ()) -> None:
        self.layers = layers
        self.owned = Storages(owned)
        self.read_elsewhere: set[str] = set()
        self._readers: dict[str, set[str | None]] = defaultdict(set)  # None stands for outside of all layers
        self._sources: dict[str, set[str | None]] = defaultdict(set)  # whose output is the first argument
        self._outputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._running: list[str | None] = []  # the layers that are open, innermost last; empty between runs

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches all that :meth:`run` runs while it lasts."""
        with intercepting(self.layers, self._run), _Watch(self._note):
            yield

    def run(self, module: nn.Module, batch: Any) -> None:
        """Runs a model on a batch, while :meth:`watching`."""
        self._outputs, self._running = WeakTensorKeyDictionary(), [None]
        returned = run_model(module, batch)
        held = list(self._outputs.values())
        if any(None not in self._readers[name] for name in held):
            gc.collect()  # a reference cycle holds tensors that nobody can read any more
            held = list(self._outputs.values())
        for name in held:
            self._readers[name].add(None)
        self._running = []
        del returned

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not watch while it lasts, and lets other runs take place."""
        own = self._outputs, self._running
        self._running = []
        try:
            yield
        finally:
            self._outputs, self._running = own

    def merge_processes(self) -> None:
        """Makes these the readers in the runs of all processes, where there are several."""
        own = (self.read_elsewhere, dict(self._readers), dict(self._sources))
        for read_elsewhere, readers, sources in gather_processes(own):
            self.read_elsewhere = self.read_elsewhere | read_elsewhere
            for mine, theirs in ((self._readers, readers), (self._sources, sources)):
                for name, seen in theirs.items():
                    mine[name] = mine[name] | seen

    def pairs(self) -> dict[str, str]:
        """Returns the name of a layer: the name of the one that reads nothing but its output, and alone reads it."""
        pairs = {}
        for name, readers in self._readers.items():
            (reader, *others) = readers or {None}
            if not others and reader is not None and self._sources[reader] == {name}:
                pairs[name] = reader
        return pairs

    def _run(self, name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of a layer."""
        first = next(iter((*args, *kwargs.values())), None)
        self._sources[name].add(self._outputs.get(first) if isinstance(first, Tensor) else None)
        self._running.append(name)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._running.pop()
        if isinstance(output, Tensor):
            self._outputs[output] = name
        return output

    def _note(self, value: Tensor, result: Any) -> None:
        """Notes that an operation takes a tensor, and what comes out of it."""
        if not self._running:
            return
        name = self._outputs.get(value)
        if name is not None:
            self._readers[name].add(self._running[-1])
        if next(tensors_in(result), None) is not None:  # reading a number such as the version of a weight is harmless
            self.read_elsewhere.update(owner for owner in self.owned.owners(value) if owner != self._running[-1])


class _Watch(TorchDispatchMode):
    """Calls a function with every tensor that an operation takes."""

    def __init__(self, note: Callable[[Tensor, Any], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tensors_in(args, kwargs or {}):
            self.note(value, result)
        return result

"""Replaces the forward of layers while something is measured."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def intercepting(layers: Mapping[str, nn.Module], run: Callable[..., Any], method: str = 'forward') -> Iterator[None]:
    """Calls ``run(name, forward, *args, **kwargs)`` in the place of the forward of each layer while it lasts.

    This is the place where the weights act: behind all forward pre-hooks, before all forward hooks, and also where a
    model calls ``layer.forward``. Hooks would miss that, and switch off the fast path of torch's encoder layers.

    Args:
        layers: Layers by name.
        run: Called with the name of a layer, its forward and what the layer was called with; returns the output.
        method: Another method to replace.
    """
    replaced = {layer: layer.__dict__[method] for layer in layers.values() if method in layer.__dict__}
    try:
        for name, layer in layers.items():
            layer.__dict__[method] = partial(run, name, getattr(layer, method))
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop(method, None)
        for layer, forward in replaced.items():
            layer.__dict__[method] = forward

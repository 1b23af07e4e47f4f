"""Replaces the forward of layers temporarily."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def intercepting(layers: Mapping[str, nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Replaces ``layer.forward(...)`` by ``run(name, forward, ...)`` inside the context.

    A replaced forward runs after all forward pre-hooks and before all forward hooks, also where a model calls
    ``layer.forward`` directly. Hooks would miss those calls and disable the fast path of
    ``nn.TransformerEncoderLayer``.

    Args:
        layers: Layers by name.
        run: Gets the name of the layer, its original forward and the arguments of the call; returns the output.
    """
    replaced = {layer: layer.__dict__['forward'] for layer in layers.values() if 'forward' in layer.__dict__}
    try:
        for name, layer in layers.items():
            layer.__dict__['forward'] = partial(run, name, layer.forward)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop('forward', None)
        for layer, forward in replaced.items():
            layer.__dict__['forward'] = forward

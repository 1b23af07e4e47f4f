"""Runs a model once on a dummy image, to see which layers run, in which order, and whose weight is read by others."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Execution:
    """What one forward pass showed.

    Attributes:
        order: The layers in the order of their first call, by ``id``.
        bypassed: The layers whose weight or bias was used outside of their own forward, by ``id``: a denoiser in the
            layer's forward would be skipped there, but would be in the weight once it is fused.
        failure: Why there was no pass, empty if there was one.
    """

    order: dict[int, None] = field(default_factory=dict)
    bypassed: set[int] = field(default_factory=set)
    failure: str = ''


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Holds modules in eval mode without gradients; afterwards they are as they were.

    ``eval()`` of a backbone does more than set flags: it may freeze parameters, renew a cache that the forward reads
    (LeViT) or leave a part in training mode. So it is called, and what it changes is put back one by one.
    """
    parts = {part: part.training for module in modules for part in module.modules()}
    attributes = {part: dict(part.__dict__) for part in parts if type(part).train is not nn.Module.train}
    trainable = {p: p.requires_grad for module in modules for p in module.parameters()}
    try:
        with torch.no_grad():
            for module in modules:
                module.eval()
            for part in parts:
                part.training = False
            yield
    finally:
        for part, before in attributes.items():
            part.__dict__.clear()
            part.__dict__.update(before)
        for part, training in parts.items():
            part.training = training
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


def probe_execution(module: nn.Module, layers: Mapping[str, nn.Module], example_input: Any = None) -> Execution:
    """Runs the module once in eval mode; nothing about it, nor the global random state, is different afterwards.

    Args:
        module: The model.
        layers: The layers to watch, by name; each with the forward of its class.
        example_input: What to call the module with; None takes one random image, (1, 3, 224, 224).

    Returns:
        An :class:`Execution`. If the module can't run on that input, its ``failure`` says why and the rest is empty.
    """
    execution = Execution()
    watch = _WeightWatch(layers.values(), execution)
    reference = next(module.parameters(), torch.empty(0))
    if example_input is None:
        generator = torch.Generator().manual_seed(0)
        example_input = torch.randn(1, 3, 224, 224, generator=generator).to(reference)
    stores = [part._buffers for part in module.modules()]
    buffers = [(store, name, buffer) for store in stores for name, buffer in store.items() if buffer is not None]
    values = [buffer.clone() for _, _, buffer in buffers]
    devices = [reference.device] if reference.is_cuda else []
    try:
        for layer in layers.values():
            layer.forward = partial(watch.run, layer, layer.forward)
        with torch.random.fork_rng(devices), watch, evaluating(module):
            module(example_input)
    except Exception as error:  # any model may fail on an input that is not made for it, in any way
        return Execution(failure=f'{type(error).__name__}: {error}'.strip().splitlines()[0])
    finally:
        for layer in layers.values():
            layer.__dict__.pop('forward', None)
        for (store, name, buffer), value in zip(buffers, values, strict=True):
            store[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)  # only where needed: expanded buffers can't be written
    return execution


class _WeightWatch(TorchDispatchMode):
    """Notes every operation that makes a tensor from a watched weight or bias outside of their own layer.

    It watches below torch's functions and around the forward of layers, since a mode for functions or a hook would
    switch off the fast path of ``nn.TransformerEncoderLayer``, which reads the weights of its children.
    """

    def __init__(self, layers, execution: Execution) -> None:
        super().__init__()
        self.owners = {id(p): id(layer) for layer in layers for p in (layer.weight, layer.bias) if p is not None}
        self.execution = execution
        self.running: list[int] = []

    def run(self, layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of a layer."""
        self.execution.order.setdefault(id(layer))
        self.running.append(id(layer))
        try:
            return forward(*args, **kwargs)
        finally:
            self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if _holds_tensor(result):  # reading a number such as the version of a weight is harmless
            for value in tensors_in(args, kwargs or {}):
                owner = self.owners.get(id(value))
                if owner is not None and owner not in self.running:
                    self.execution.bypassed.add(owner)
        return result


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yields every tensor in nested dicts, lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)


def _holds_tensor(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def image_channels(module: nn.Module) -> int:
    """Returns how many channels the images of a model have: those of its first convolution, or three.

    More than four are not believed: the convolution that is registered first need not be the one that runs first.
    """
    channels = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    return channels if channels <= 4 else 3

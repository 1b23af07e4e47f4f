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
    """Holds modules in eval mode without gradients, and gives every submodule its own mode back.

    The flags are set one by one, because ``train()`` of a backbone may freeze parameters or return nothing.
    """
    modes = {m: m.training for module in modules for m in module.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = [reference.device] if reference.is_cuda else []
    try:
        for layer in layers.values():
            layer.forward = partial(watch.run, layer, layer.forward)
        with torch.random.fork_rng(devices), evaluating(module), watch:
            module(example_input)
    except Exception as error:  # any model may fail on an input that is not made for it, in any way
        return Execution(failure=f'{type(error).__name__}: {error}'.strip().splitlines()[0])
    finally:
        for layer in layers.values():
            layer.__dict__.pop('forward', None)
        for name, buffer in module.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape and not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])  # only where needed: expanded buffers can't be written
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
            for value in _tensors(args, kwargs or {}):
                owner = self.owners.get(id(value))
                if owner is not None and owner not in self.running:
                    self.execution.bypassed.add(owner)
        return result


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(*value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(*value)


def _holds_tensor(value: Any) -> bool:
    return next(_tensors(value), None) is not None

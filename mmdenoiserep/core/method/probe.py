"""Runs a model once on a dummy image, to see which layers run, in which order, and whose weight is read by others."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ..utils.randomness import equal_draws
from ..utils.storage import Storages
from ..utils.tensors import tensors_in


@dataclass
class Execution:
    """What one forward pass showed.

    Attributes:
        order: The layers in the order of their first call, by ``id``.
        bypassed: The layers whose weight or bias was used outside of their own forward, by ``id``: a denoiser in the
            layer's forward would be skipped there, but would be in the weight once it is fused.
        past_hooks: The layers that were called by ``.forward``, or with their input by keyword, by ``id``: hooks on a
            layer, which training and fits need, do not see that input.
        attributes: The names of the attributes that the forward set on the layers, by ``id``.
        failure: Why there was no pass, empty if there was one.
    """

    order: dict[int, None] = field(default_factory=dict)
    bypassed: set[int] = field(default_factory=set)
    past_hooks: set[int] = field(default_factory=set)
    attributes: dict[int, set[str]] = field(default_factory=dict)
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


def run_model(module: nn.Module, example_input: Any) -> Any:
    """Calls a module with an input, and with None for whatever its forward requires besides.

    The backbones of masked image modelling (SimMIM, MaskFeat, BEiT) require a mask, of which None means no mask.
    """
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    except ValueError:  # a forward that is not written in Python has no signature
        parameters = []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    return module(example_input, **dict.fromkeys(required))


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
    reference = next(module.parameters(), torch.empty(0, device='cpu'))
    if example_input is None:
        generator = torch.Generator().manual_seed(0)
        example_input = torch.randn(1, 3, 224, 224, generator=generator, device='cpu').to(reference)
    try:
        with untouched(module):
            for layer in layers.values():
                layer.forward = partial(watch.run, layer, layer.forward)
            with equal_draws(module), watch, evaluating(module):
                run_model(module, example_input)
            execution.attributes = {id(layer): set(layer.__dict__) for layer in layers.values()}
    except Exception as error:  # any model may fail on an input that is not made for it, in any way
        return Execution(failure=f'{type(error).__name__}: {error}'.strip().splitlines()[0])
    return execution


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Puts back what happens to a module while it lasts: attributes, what is registered, parameters and buffers.

    A forward may set flags, make or resize buffers and caches, and initialise weights from the first batch.
    """
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]  # it has no dicts
    attributes = [(part, dict(part.__dict__)) for part in parts]
    stores: list[dict] = [store for part in parts for store in (part._parameters, part._buffers, part._modules)]
    registered = [(store, dict(store)) for store in stores]
    tensors = {id(t): t for _, entries in registered for t in entries.values() if isinstance(t, Tensor)}
    values = [(t, t.detach().clone()) for t in tensors.values() if not t.is_meta]
    try:
        yield
    finally:
        for part, before in attributes:
            part.__dict__.clear()
            part.__dict__.update(before)
        for store, entries in registered:
            store.clear()
            store.update(entries)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # only where needed: expanded buffers can't be written
                    tensor.resize_(value.shape).copy_(value) if tensor.shape != value.shape else tensor.copy_(value)


class _WeightWatch(TorchDispatchMode):
    """Notes every operation that makes a tensor from a watched weight or bias outside of their own layer.

    It watches below torch's functions and around the forward of layers, since a mode for functions or a hook would
    switch off the fast path of ``nn.TransformerEncoderLayer``, which reads the weights of its children. A weight is
    known by its memory: a view of it that the model keeps elsewhere is the weight as well.
    """

    def __init__(self, layers: Iterable[nn.Module], execution: Execution) -> None:
        super().__init__()
        self.owned = Storages((id(layer), p) for layer in layers for p in (layer.weight, layer.bias))
        self.execution = execution
        self.running: list[int] = []

    def run(self, layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of a layer."""
        self.execution.order.setdefault(id(layer))
        if kwargs or sys._getframe(1).f_globals is not nn.modules.module.__dict__:  # where Module.__call__ is
            self.execution.past_hooks.add(id(layer))
        self.running.append(id(layer))
        try:
            return forward(*args, **kwargs)
        finally:
            self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if _holds_tensor(result):  # reading a number such as the version of a weight is harmless
            for value in tensors_in(args, kwargs or {}):
                self.execution.bypassed.update(set(self.owned.owners(value)).difference(self.running))
        return result


def _holds_tensor(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def image_channels(module: nn.Module) -> int:
    """Returns how many channels the images of a model have: those of its first convolution, or three.

    More than four are not believed: the convolution that is registered first need not be the one that runs first.
    """
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return 3
    known = isinstance(first.weight, Tensor) and not is_lazy(first.weight)
    channels = first.weight.shape[1] * first.groups if known else first.in_channels  # the weight may be a new one
    return channels if channels <= 4 else 3

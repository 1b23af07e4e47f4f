"""Runs a model once to find the execution order of its layers, and layers whose weight is used elsewhere."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ..utils.intercept import intercepting
from ..utils.randomness import equal_draws, random_images
from ..utils.storage import Storages
from ..utils.tensors import tensors_in


@dataclass
class Execution:
    """What one forward pass of a model showed; layers are given by ``id``.

    Attributes:
        order: The layers in the order of their first call.
        bypassed: Layers whose weight or bias was used outside of their own forward, where only the fused weight has an
            effect: a denoiser in the layer's forward has none.
        without_hooks: Layers that were called as ``layer.forward(x)`` or with a keyword argument. Hooks, which training
            and fits need, do not see their input.
        attributes: The names of the layers' attributes during the forward.
        failure: Why the model did not run, or an empty string.
    """

    order: dict[int, None] = field(default_factory=dict)
    bypassed: set[int] = field(default_factory=set)
    without_hooks: set[int] = field(default_factory=set)
    attributes: dict[int, set[str]] = field(default_factory=dict)
    failure: str = ''


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Sets modules to eval mode and disables gradients inside the context; restores the modules afterwards.

    ``eval()`` of a backbone may freeze parameters, renew a cache that the forward reads (LeViT), or leave submodules in
    training mode. So the context calls ``eval()``, and restores modes, attributes and ``requires_grad``.
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
    """Calls a module with an input, and with None for every other required argument of its forward.

    Backbones of masked image modelling (SimMIM, MaskFeat, BEiT) require a mask, where None means no mask.
    """
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    except ValueError:  # a forward that is not written in Python has no signature
        parameters = []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    return module(example_input, **dict.fromkeys(required))


def probe_execution(module: nn.Module, layers: Mapping[str, nn.Module], example_input: Any = None) -> Execution:
    """Runs a module once in eval mode; restores its state and the global random state afterwards.

    Args:
        module: The model.
        layers: The layers to observe, by name; none has a ``forward`` on the object.
        example_input: Input of the module; None takes one random image, (1, 3, 224, 224).

    Returns:
        An :class:`Execution`. If the module can't run on the input, only ``failure`` is set.
    """
    execution = Execution()
    watch = _WeightWatch(layers, execution)
    if example_input is None:
        example_input = default_images(module, 1)
    try:
        with restoring_state(module), intercepting(layers, watch.run):
            with equal_draws(module), watch, evaluating(module):
                run_model(module, example_input)
            execution.attributes = {id(layer): set(layer.__dict__) for layer in layers.values()}
    except Exception as error:  # any error: the model may not be made for the input
        return Execution(failure=f'{type(error).__name__}: {error}'.strip().splitlines()[0])
    return execution


def default_images(module: nn.Module, number: int) -> Tensor:
    """Returns random images, (number, 3, 224, 224), of the device and dtype of a module's parameters."""
    images = random_images((number, 3, 224, 224))
    return images.to(next(module.parameters(), images))


@contextmanager
def restoring_state(module: nn.Module) -> Iterator[None]:
    """Restores attributes, submodules, parameters and buffers of a module afterwards.

    A forward may set flags, create or resize buffers and caches, and initialise weights from the first batch.
    """
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]  # has no dicts
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
                if not torch.equal(tensor, value):  # expanded buffers can't be written
                    tensor.resize_(value.shape).copy_(value) if tensor.shape != value.shape else tensor.copy_(value)


class _WeightWatch(TorchDispatchMode):
    """Records the calls of layers, and operations that use the weight or bias of a layer outside of its forward.

    A torch function mode or hooks would disable the fast path of ``nn.TransformerEncoderLayer``, which reads the
    weights of its children. A weight is recognised by its memory, so a view that the model keeps counts as the weight.
    """

    def __init__(self, layers: Mapping[str, nn.Module], execution: Execution) -> None:
        super().__init__()
        self.ids = {name: id(layer) for name, layer in layers.items()}
        self.owned = Storages((id(layer), p) for layer in layers.values() for p in (layer.weight, layer.bias))
        self.execution = execution
        self.running: list[int] = []

    def run(self, name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of a layer, see :func:`intercepting`."""
        self.execution.order.setdefault(self.ids[name])
        if kwargs or sys._getframe(1).f_globals is not nn.modules.module.__dict__:  # the caller is not Module.__call__
            self.execution.without_hooks.add(self.ids[name])
        self.running.append(self.ids[name])
        try:
            return forward(*args, **kwargs)
        finally:
            self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(True for _ in tensors_in(result)):  # reading a number, such as the version of a weight, is harmless
            for value in tensors_in(args, kwargs or {}):
                self.execution.bypassed.update(set(self.owned.owners(value)).difference(self.running))
        return result


def image_channels(module: nn.Module) -> int:
    """Returns the number of channels of a model's images: the input channels of its first convolution, or 3.

    Returns 3 also where the first convolution has more than 4, because registered first need not mean executed first.
    """
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return 3
    known = isinstance(first.weight, Tensor) and not is_lazy(first.weight)
    channels = first.weight.shape[1] * first.groups if known else first.in_channels  # `in_channels` may be stale
    return channels if channels <= 4 else 3

"""Fits the layers of a model to the domain of some unlabelled images, one after the other."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .feeding import find_sole_readers
from .gather import (
    SeenAll,
    check_finite,
    count_images,
    fitted_on_output,
    gather,
    sum_processes,
    without_zero_denoisers,
)
from .layers import DenoiseLayer
from .moments import Moments
from .probe import evaluating
from .sample import Sample
from .transport import transport


def apply_map(layer: nn.Module, x: Tensor, linear: Tensor, constant: Tensor) -> Tensor:
    """Returns ``A x + c`` of what a layer takes (Linear) or gives (convolution), laid out as it is there.

    Args:
        layer: The layer.
        x: (..., C), or (B, C, H, W) of a convolution.
        linear: A, (groups, size, size).
        constant: c, (groups, size).
    """
    if isinstance(layer, nn.Conv2d):
        kernel = linear.flatten(0, 1)[..., None, None].to(x)
        return F.conv2d(x, kernel, constant.flatten().to(x), groups=linear.shape[0])
    return F.linear(x, linear[0].to(x), constant[0].to(x))


@contextmanager
def explicit_maps(module: nn.Module, maps: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Makes layers take or give ``A x + c`` while it lasts, step by step: what a domain fit folds into the weights.

    Args:
        module: A model before the fit, with denoisers or without.
        maps: A and c by layer name.
    """

    def on_input(linear: Tensor, constant: Tensor, layer: nn.Module, args: tuple) -> tuple:
        return apply_map(layer, args[0], linear, constant), *args[1:]

    def on_output(linear: Tensor, constant: Tensor, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return apply_map(layer, output, linear, constant)

    handles = []
    try:
        for name, (linear, constant) in maps.items():
            layer = module.get_submodule(name)
            if fitted_on_output(layer):
                handles.append(layer.register_forward_hook(partial(on_output, linear, constant)))
            else:
                handles.append(layer.register_forward_pre_hook(partial(on_input, linear, constant)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class FittedLayer:
    """What was done to one layer.

    Attributes:
        linear: A, float64, (groups, size, size).
        constant: c, float64, (groups, size); zero where nothing could take it.
        target: Moments of the features before.
        note: What could not be done, or empty.
    """

    linear: Tensor
    constant: Tensor
    target: Moments
    note: str = ''


class DomainFit:
    """Carries the moments of every layer to those in the training domain: ``x' = A x + c``.

        Linear, on its input:        ``W' = W A``,   ``b' = b + W c``
        convolution, on its output:  ``W' = A W``,   ``b' = A b + c``

    in the weights of the model, whose architecture stays as it is. Without a bias, c goes where nothing else reads it:
    for a Linear layer ``A^-1 c`` into the bias of the LayerNorm that it alone reads; for a convolution c off the
    running mean of the BatchNorm that alone reads it.

    Args:
        module: The model.
        layers: The layers to fit, first executed first; their denoisers must be zero.
        source: Moments in the training domain by layer name.
        example: A batch to see with which layer feeds which.
        fit: See :func:`transport`.
        rank: Likewise.
        prior: Images that the source's moments are worth.
        every: See :func:`collect_moments`.

    Attributes:
        images: Images seen, in all processes.
        passes: How often they were run through the model.
        fitted: What was done, by layer name.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, DenoiseLayer],
        source: Mapping[str, Moments],
        example: Any,
        fit: str,
        rank: int | None,
        prior: float,
        every: int,
    ) -> None:
        self.module = module
        self.layers = layers
        self.source = source
        self.fit = fit
        self.rank = rank
        self.prior = prior
        self.every = every
        self.images = 0
        self.passes = 0
        self.fitted: dict[str, FittedLayer] = {}
        norms = {name: norm for name, norm in module.named_modules() if isinstance(norm, nn.LayerNorm | _BatchNorm)}
        self.norms: dict[str, nn.Module] = {}
        on_output = {name for name, layer in layers.items() if fitted_on_output(layer)}
        on_input = set(layers) - on_output
        one = example[:1] if isinstance(example, Tensor) else example  # who feeds whom, one image shows
        for giver, reader in find_sole_readers(module, {**layers, **norms}, one).items():
            before, after = norms.get(giver), norms.get(reader)
            if isinstance(after, _BatchNorm) and after.running_mean is not None and giver in on_output:
                self.norms[giver] = after
            elif isinstance(before, nn.LayerNorm) and before.bias is not None and reader in on_input:
                self.norms[reader] = before

    def run(self, batches: Iterable[Any]) -> None:
        """Fits all layers: in turn on a single batch, else with a pass for each.

        Several layers in one pass would not do: each would take off again what the one before it takes off.
        """
        size = getattr(batches, '__len__', lambda: 0)()
        if not sum_processes(size != 1):  # the same in all processes
            self._in_turn(next(iter(batches)))
            return
        for name, layer in self.layers.items():
            moments, self.images = gather(self.module, batches, {name: layer}, False, self.every)
            self._correct(name, moments[name])
            self.passes += 1

    def _in_turn(self, batch: Any) -> None:
        """Fits each layer when the batch reaches it, and ends behind the last one."""
        self.passes = 1
        self.images = sum_processes(count_images(batch))
        sample = Sample(self.every)

        def measure(layer: DenoiseLayer, x: Tensor) -> Moments:
            moments = Moments.of(sample(layer, x))
            moments.merge_processes()
            return moments

        def end_behind_the_last() -> None:
            if len(self.fitted) == len(self.layers):
                raise SeenAll

        def on_input(name: str, layer: DenoiseLayer, args: tuple) -> tuple | None:
            if name in self.fitted:  # a shared layer was corrected in its first place
                return None
            shift = self._correct(name, measure(layer, args[0]))
            end_behind_the_last()
            return None if shift is None else (args[0] + shift.flatten().to(args[0]), *args[1:])

        def on_output(name: str, layer: DenoiseLayer, args: tuple, output: Tensor) -> Tensor | None:
            if name in self.fitted:
                return None
            self._correct(name, measure(layer, output))
            end_behind_the_last()
            fitted = self.fitted[name]  # without a bias, the norm behind it has taken the constant
            constant = fitted.constant if layer.bias is not None else torch.zeros_like(fitted.constant)
            return apply_map(layer, output, fitted.linear, constant)

        handles = [
            layer.register_forward_hook(partial(on_output, name))
            if fitted_on_output(layer)
            else layer.register_forward_pre_hook(partial(on_input, name))
            for name, layer in self.layers.items()
        ]
        try:
            with evaluating(self.module), without_zero_denoisers(self.module), suppress(SeenAll):
                self.module(batch)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _correct(self, name: str, target: Moments) -> Tensor | None:
        """Fits one layer in place; returns what must be added to its present input, for a LayerNorm has changed."""
        check_finite(name, target)
        layer = self.layers[name]
        weight, norm = layer.weight.double(), self.norms.get(name)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        prior = self.prior / (self.prior + self.images)
        source = self.source[name].to(target.mean.device)  # a file's moments are on the CPU
        linear, constant = transport(source, target, self.fit, self.rank, prior)
        note, shift = '', None
        if bias is None and norm is None:
            note = 'no bias or norm takes the shift of the mean, so it is left out'
            constant = torch.zeros_like(constant)
        if fitted_on_output(layer):
            layer.weight.copy_((linear @ weight.reshape(*linear.shape[:2], -1)).reshape(weight.shape))
            if bias is not None:
                bias.copy_((linear @ bias.double().reshape(*linear.shape[:2], 1)).flatten() + constant.flatten())
            elif norm is not None:
                norm.running_mean.sub_(constant.flatten())  # type: ignore[operator, union-attr]
        else:
            layer.weight.copy_(weight @ linear[0])
            if bias is not None:
                bias.add_(weight @ constant[0])
            elif norm is not None:
                shift = torch.linalg.solve(linear, constant[..., None])[..., 0]
                norm.bias.add_(shift[0])  # type: ignore[operator, union-attr]
        self.fitted[name] = FittedLayer(linear, constant, target, note)
        return shift

"""Gathers the moments of what flows through the denoised layers of a model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layers import DenoiseLayer, forwarding
from .moments import Moments
from .probe import evaluating, tensors_in
from .sample import Sample


def denoised_layers(module: nn.Module) -> dict[str, DenoiseLayer]:
    """Returns the denoised layers by name, first executed first.

    Raises:
        ValueError: There is none.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, DenoiseLayer)}
    if not found:
        raise ValueError('the model has no denoisers; convert it with apply_denoiserep first')
    return dict(sorted(found.items(), key=lambda item: -item[1].timestep))


def collect_moments(
    module: nn.Module, batches: Iterable[Any], *, inputs: bool = False, every: int = 1
) -> dict[str, Moments]:
    """Gathers the moments of every denoised layer in one pass, in eval mode and without gradients.

    Where a domain fit acts: on the input of a Linear layer, on the output of a convolution. They are those of all
    processes, where there are several, each with its own batches.

    Args:
        module: A model that :func:`apply_denoiserep` converted.
        batches: What to call the module with, one batch of images after the other.
        inputs: Takes the inputs of convolutions too.
        every: Takes a random one in so many vectors (tokens, pixels) of each batch; the same ones every time.

    Returns:
        The moments by layer name, first executed first.

    Raises:
        ValueError: The module has no denoisers, there is no batch, or the features are not finite.
    """
    layers = denoised_layers(module)
    moments, images = gather(module, batches, layers, inputs, every)
    if not images:
        raise ValueError('there is no image to gather moments of')
    return moments


def gather(
    module: nn.Module, batches: Iterable[Any], layers: Mapping[str, DenoiseLayer], inputs: bool, every: int
) -> tuple[dict[str, Moments], int]:
    """Does the pass of :func:`collect_moments` for some layers; returns the number of images too.

    The first batch shows how often they run; the others end there, and save what comes after.
    """
    moments: dict[str, Moments] = {}
    images = calls = calls_of_first = 0
    sample = Sample(every)

    def listen(name: str, layer: DenoiseLayer) -> RemovableHandle:
        def add(x: Tensor) -> None:
            nonlocal calls
            vectors = sample(layer, x)
            if name in moments:
                moments[name].update(vectors)
            else:
                moments[name] = Moments.of(vectors)
            calls += 1
            if calls == calls_of_first:
                raise SeenAll

        if fitted_on_output(layer) and not inputs:
            return layer.register_forward_hook(lambda layer, args, output: add(output))
        return layer.register_forward_pre_hook(lambda layer, args: add(args[0]))

    handles = [listen(name, layer) for name, layer in layers.items()]
    try:
        with evaluating(module), without_zero_denoisers(module):
            for batch in batches:
                images += count_images(batch)
                calls = 0
                with suppress(SeenAll):
                    module(batch)
                calls_of_first = calls_of_first or calls
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name in moments:
            moments[name].merge_processes()
            check_finite(name, moments[name])
    return {name: moments[name] for name in layers if name in moments}, sum_processes(images)


def check_finite(name: str, moments: Moments) -> None:
    """Raises a ValueError if the features of a layer were not finite."""
    if not moments.scatter.isfinite().all():
        raise ValueError(f'the features of {name} hold NaN or Inf; look at the weights and at the images')


@contextmanager
def without_zero_denoisers(module: nn.Module) -> Iterator[None]:
    """Leaves denoisers that are zero out of the forward while it lasts: they cost as much as any other."""
    idle = [m for m in module.modules() if isinstance(m, DenoiseLayer) and m.denoiser.is_zero()]
    with forwarding(idle, lambda layer, x: layer.forward_plain(x, layer.weight, layer.bias)):
        yield


class SeenAll(Exception):
    """Ends a forward whose rest nobody needs."""


def fitted_on_output(layer: nn.Module) -> bool:
    """Whether a domain fit corrects what the layer returns: a convolution, whose padding a constant would miss."""
    return isinstance(layer, nn.Conv2d)


def count_images(batch: Any) -> int:
    """Returns the length of the first tensor in a batch."""
    return len(next(tensors_in(batch)))


def sum_processes(number: int) -> int:
    """Returns the sum over all processes, where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    numbers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(numbers, number)
    return sum(numbers)

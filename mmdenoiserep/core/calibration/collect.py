"""Gathers the moments of what flows through the layers of a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..method.layers import Layer, input_channels
from ..method.probe import evaluating, run_model
from ..method.sample import Sample
from ..utils.intercept import intercepting
from .batches import count_images
from .moments import CalibrationError, Moments, gather_processes


def collect_moments(
    module: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    *,
    inputs: bool = False,
    every: int = 1,
) -> dict[str, Moments]:
    """Gathers the moments of layers in one pass, in eval mode and without gradients.

    Where a domain fit acts: on the input of a Linear layer, on the output of a convolution. They are those of all
    processes, where there are several, each with its own batches, and of all calls of a layer.

    Args:
        module: The model.
        layers: Layers of the model by name, of :func:`select_layers`.
        batches: What to call the module with, one batch of images after the other.
        inputs: Takes the inputs of convolutions too.
        every: Takes a random one in so many vectors (tokens, pixels) of each batch; the same ones every time.

    Returns:
        The moments by layer name, in the order of ``layers``; those of a layer that no image reaches have the count 0.

    Raises:
        CalibrationError: There is no layer or no image, or the features are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> images = torch.randn(64, 3, 2, 2)
        >>> source = collect_moments(model, select_layers(model, example_input=images), [images])
        >>> source['1'].count
        64
    """
    if not layers:
        raise CalibrationError('there is no layer to gather moments of')
    moments, images = gather(module, batches, layers, inputs, every)
    if not images:
        raise CalibrationError('there is no image to gather moments of')
    return moments


def gather(
    module: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, Layer],
    inputs: bool,
    every: int,
    run: Callable[[nn.Module, Any], Any] = run_model,
    calls: Sequence[int] = (),
) -> tuple[dict[str, Moments], int]:
    """Does the pass of :func:`collect_moments` for some layers; returns the number of images too.

    Args:
        module: See :func:`collect_moments`.
        batches: Likewise.
        layers: The layers to listen to.
        inputs: See :func:`collect_moments`.
        every: Likewise.
        run: Called with the module and a batch in the place of the module.
        calls: How often each batch calls the layers, where that is known: its forward ends there, and saves what comes
            after. Batches beyond the last entry run to their end.
    """
    moments = {name: empty_moments(layer, inputs) for name, layer in layers.items()}
    images = number = done = 0
    sample = Sample(every)

    def listen(name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        nonlocal done
        (x,) = (*args, *keywords.values())
        layer, output = layers[name], None
        if inputs or not fitted_on_output(layer):
            moments[name].update(sample(layer, x))
        else:
            output = forward(x)
            moments[name].update(sample(layer, output))
        done += 1
        if number < len(calls) and done == calls[number]:
            raise SeenAll
        return forward(x) if output is None else output

    with evaluating(module), intercepting(layers, listen):
        for batch in batches:
            images += count_images(batch)
            done = 0
            with suppress(SeenAll):
                run(module, batch)
            number += 1
    for name, seen in moments.items():
        seen.merge_processes()
        check_finite(name, seen)
    return moments, sum_processes(images)


def empty_moments(layer: Layer, inputs: bool = False) -> Moments:
    """Returns moments that have seen nothing, of what a domain fit corrects in a layer, or of its input."""
    channels, groups = input_channels(layer)  # type: ignore[arg-type]
    if fitted_on_output(layer) and not inputs:
        channels = layer.weight.shape[0]
    return Moments(groups, channels // groups, layer.weight.device)


def too_few(seen: Moments, every: int, images: int) -> str:
    """Returns why moments are of too few vectors; empty if they are not.

    Where every image reaches a layer, the number of images says whether they are enough. An expert or a branch that
    some of them reach needs more vectors than channels: fewer span no covariance.

    Args:
        seen: Moments of a layer.
        every: One in so many vectors was taken.
        images: Images seen.
    """
    size = seen.mean.shape[1]
    if not seen.count:
        return 'none of these images reaches it'
    if seen.count <= size and seen.count * every < images:
        return f'{seen.count} vectors of some of these images are too few for {size} channels'
    return ''


def check_finite(name: str, moments: Moments) -> None:
    """Raises a CalibrationError if the features of a layer were not finite."""
    if not (moments.scatter.isfinite().all() and moments.mean.isfinite().all()):
        raise CalibrationError(
            f'the features of {name} hold NaN or Inf, or overflow; look at the weights and at the images'
        )


class SeenAll(BaseException):
    """Ends a forward whose rest nobody needs; a model that catches every Exception does not catch it."""


def fitted_on_output(layer: Layer) -> bool:
    """Whether a domain fit corrects what the layer returns: a convolution, whose padding a constant would miss."""
    return isinstance(layer, nn.Conv2d)


def sum_processes(number: int) -> int:
    """Returns the sum over all processes, where there are several."""
    return sum(gather_processes(number))

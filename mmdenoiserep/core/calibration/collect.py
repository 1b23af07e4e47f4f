"""Gathers the moments of what flows through the layers of a model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..method.layers import Layer
from ..method.probe import evaluating, run_model
from ..method.sample import Sample
from ..utils.intercept import intercepting
from .batches import count_images
from .features import Features
from .moments import CalibrationError, Moments, gather_processes

Stride = int | Mapping[str, int]
"""One in so many vectors: for all layers, or by layer name, where a layer without a number has 1."""


def collect_moments(
    module: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    *,
    inputs: bool = False,
    stride: Stride = 1,
) -> dict[str, Moments]:
    """Gathers the moments of layers in one pass, in eval mode and without gradients.

    They are taken where a domain fit acts: on the input of a Linear layer, on the output of a convolution; of a layer
    that runs several times in a forward, at its first call. Several processes, each with its own batches, pool them.

    Args:
        module: The model.
        layers: Layers of the model by name, of :func:`select_layers`.
        batches: What to call the module with, one batch of images after the other.
        inputs: Takes the inputs of convolutions too, and all calls of a layer: what denoisers are solved for.
        stride: Takes a random one in so many vectors (tokens, pixels) of each batch, the same ones every time: a number
            for all layers, or one for each by name.

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
    moments, images = gather(module, batches, layers, inputs, stride)
    if not images:
        raise CalibrationError('there is no image to gather moments of')
    return moments


def gather(
    module: nn.Module, batches: Iterable[Any], layers: Mapping[str, Layer], inputs: bool, stride: Stride
) -> tuple[dict[str, Moments], int]:
    """Does the pass of :func:`collect_moments`; returns the number of images too."""
    features = {name: Features(layer, inputs) for name, layer in layers.items()}
    gathered = {name: seen.empty() for name, seen in features.items()}
    images = 0
    sample, called = Sample(), set[str]()

    def listen(name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        (x,) = (*args, *keywords.values())
        output = forward(x)
        if inputs or name not in called:
            called.add(name)
            gathered[name].update(features[name].vectors(sample, x, stride_of(stride, name), output))
        return output

    with evaluating(module), intercepting(layers, listen):
        for number, batch in enumerate(batches):
            count = count_images(batch)
            images += count
            sample, called = Sample(seed=number, images=count), set()
            run_model(module, batch)
    moments = {}
    for name, seen in gathered.items():
        seen.merge_processes()
        moments[name] = features[name].moments(seen)
        check_finite(name, moments[name])
    return moments, sum_processes(images)


def stride_of(stride: Stride, name: str) -> int:
    """Returns the stride of a layer.

    Raises:
        CalibrationError: It is below 1.
    """
    number = stride.get(name, 1) if isinstance(stride, Mapping) else stride
    if number < 1:
        raise CalibrationError(f'stride must be 1 or more, got {number}')
    return number


def too_few(seen: Moments, stride: int, images: int) -> str:
    """Returns why moments are of too few vectors; empty if they are not.

    Where every image reaches a layer, the number of images says whether they are enough. An expert or a branch that
    some of them reach needs more vectors than channels: fewer span no covariance.

    Args:
        seen: Moments of a layer.
        stride: One in so many vectors was taken.
        images: Images seen.
    """
    size = seen.mean.shape[1]
    if not seen.count:
        return 'none of these images reaches it'
    if seen.count <= size and seen.count * stride < images:
        return f'{seen.count} vectors of some of these images are too few for {size} channels'
    return ''


def check_finite(name: str, moments: Moments) -> None:
    """Raises a CalibrationError if the features of a layer were not finite."""
    if not (moments.scatter.isfinite().all() and moments.mean.isfinite().all()):
        raise CalibrationError(
            f'the features of {name} hold NaN or Inf, or overflow; look at the weights and at the images'
        )


def sum_processes(number: int) -> int:
    """Returns the sum over all processes, where there are several."""
    return sum(gather_processes(number))

"""Fits the layers of a model to the domain of some unlabelled images, in one pass."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..method.layers import DenoiseLayer, Layer
from ..method.probe import evaluating
from ..method.sample import Sample
from ..utils.intercept import intercepting
from ..utils.lockstep import Lockstep
from .batches import count_images
from .collect import Stride, check_finite, stride_of, sum_processes, too_few
from .features import Features, fitted_on_output
from .halves import ImageVectors
from .maps import before_map, fold_map
from .match import find_support, transport
from .moments import RIDGE, CalibrationError, Moments, gather_processes
from .norms import find_norms
from .readers import Readers
from .report import CalibratedLayer, CalibrationReport, make_report, make_row
from .takers import Takers, find_obstacles, owned_tensors

STRENGTH = 0.5
"""Strength of all maps but that of the first layer.

With a shift of the domains of energy D and an error of energy E in the map, in the metric that counts for the model, a
strength of s leaves ``(1 - s)^2 D + s^2 E``. So half of it takes three quarters of the shift, a quarter of the error,
and harms only where ``E > 3 D``; all of it harms where ``E > D``. The first layer reads what the camera gives, and has
far more vectors than channels; every later one reads features that the layers before have corrected in part, and
depends on what the images show.
"""
MOST_PASSES = 5
"""Passes after which a fit gives up. One is enough if its first image shows who reads what, two if another one does."""


def fit_domain(
    module: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    source: Mapping[str, Moments],
    *,
    stride: Stride = 1,
    spectra: bool = False,
    maps: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> CalibrationReport:
    """Fits layers of a model to the images of the place where it will run, in place.

    An affine map carries the moments of each layer's features towards those in the training domain, see
    :func:`transport`, as far as the images support it, see :func:`find_support`, and is folded into the weights, see
    :func:`fold_map`. The layers follow each other in the order of execution, each fitted on the stream that the earlier
    ones correct, in one pass: the forwards of all batches pause at each layer until it is fitted. Meanwhile the
    features of all images at that place of the model are in memory, and the sampled vectors of the layer.

    A layer that runs several times in a forward is fitted on its first call.

    Args:
        module: The model.
        layers: Layers of the model by name, first executed first, of :func:`select_layers`; the others stay.
        batches: What to call the module with, of any sizes; each process has its own.
        source: Moments in the training domain, of :func:`collect_moments` or :func:`load_moments`.
        stride: See :func:`collect_moments`.
        spectra: Whether the report has the spectra of all layers, which cost two decompositions each.
        maps: Whether the report has the maps of all layers.
        progress: Called with the name of each layer when it is done.

    Returns:
        A :class:`CalibrationReport`.

    Raises:
        CalibrationError: There is no layer or no image, the model has denoisers, the source does not fit, the features
            of a layer are not finite, or no layer can be fitted. The model is as it was then, as after
            any other error and an interrupt.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> images = torch.randn(64, 3, 2, 2)
        >>> layers = select_layers(model, example_input=images)
        >>> source = collect_moments(model, layers, [images])
        >>> dark = 0.5 * images
        >>> report = fit_domain(model, layers, [dark], source)
        >>> report.layers[0].name
        '1'
    """
    if not layers:
        raise CalibrationError('there is no layer to fit')
    if any(isinstance(layer, DenoiseLayer) for layer in module.modules()):
        raise CalibrationError('the model has denoisers; fuse it first (fuse_model) and select its layers then')
    if missing := next((name for name in layers if name not in source), None):
        raise CalibrationError(f'source has no moments of {missing}; gather them with the same targets')
    keep = dict(spectra=spectra, maps=maps)
    if iter(batches) is batches:
        batches = list(batches)  # a second pass may be needed
    owned = owned_tensors(module, layers)
    readers = Readers({**layers, **find_norms(module)}, owned)
    with all_or_nothing(tensor for _, tensor in owned if tensor is not None) as undo:
        for _ in range(MOST_PASSES):
            domain = DomainPass(module, layers, source, stride, keep, readers, progress)
            if domain.run(batches):
                rows = [domain.rows[name] for name in layers if name in domain.rows]
                return make_report('domain', domain.images, rows, domain.skipped)
            undo()
        raise CalibrationError(
            f'each of {MOST_PASSES} passes over the same images read the outputs of the layers in another way; '
            'look for randomness in the forward of the model'
        )


@contextmanager
def all_or_nothing(tensors: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Yields a function that restores tensors, and calls it if an error or an interrupt ends the context."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def undo() -> None:
        for tensor, value in before:
            tensor.copy_(value)

    try:
        yield undo
    except BaseException:
        undo()
        raise


class DomainPass:
    """One pass of a domain fit: all batches advance together, from one layer to the next.

    Args:
        module: The model.
        layers: The layers to fit, first executed first.
        source: Moments in the training domain by layer name.
        stride: See :func:`collect_moments`.
        keep: What the report has of each layer, see :func:`make_row`.
        readers: Watches who reads the outputs of the layers; what earlier passes have shown is kept.
        progress: Called with the name of each layer when it is done.

    Attributes:
        images: Images seen, in all processes.
        rows: What was done, by layer name.
        skipped: Why a layer was left as it is, by its name.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        source: Mapping[str, Moments],
        stride: Stride,
        keep: Mapping[str, bool],
        readers: Readers,
        progress: Callable[[str], Any] | None,
    ) -> None:
        self.module = module
        self.layers = layers
        self.source = source
        self.stride = stride
        self.keep = keep
        self.readers = readers
        self.progress = progress
        self.obstacles = find_obstacles(module)  # before the forwards of the norms are replaced
        self.images = 0
        self.rows: dict[str, CalibratedLayer] = {}
        self.skipped: dict[str, str] = {}
        self.done: set[str] = set()
        self.vectors: dict[str, ImageVectors] = {}  # of the layers where batches wait
        self.shift: Tensor | None = None  # of the input of the layer whose batches go on
        self.calls_after: Counter[str] = Counter()  # of layers that were fitted before
        self.single: dict[str, torch.Size] = {}  # shape of what each layer takes of one image
        self.sample: Sample | None = None  # of the batch that runs
        self.steps = Lockstep()

    def run(self, batches: Iterable[Any]) -> bool:
        """Fits every layer once all batches have come to it.

        Returns:
            Whether the constants went where they may go. If not, the readers know better now, and the pass is to be
            undone and repeated.

        Raises:
            CalibrationError: There is no image, or the features of a layer are not finite.
        """
        all_layers = sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in self.module.modules())
        with (
            evaluating(self.module),
            intercepting(self.layers, self._call),
            self.readers.watching(),
            self.steps,
        ):
            for number, batch in enumerate(batches):
                self.images += count_images(batch)
                if not number:  # one image shows who reads what
                    self.readers.run(self.module, batch[:1] if isinstance(batch, Tensor) else batch)
                self.steps.start(partial(self._run, batch, number))
            self.images = sum_processes(self.images)
            if not self.images:
                raise CalibrationError('there is no image to calibrate with')
            self.readers.merge_processes()
            self.takers = Takers.seen_by(self.readers, self.module, self.layers, self.obstacles)
            while (name := self._next()) is not None:
                self._fit(name)
                if len(self.done) == len(self.layers) < all_layers:
                    break  # otherwise the runs end soon, and show who reads what behind the last layer
                self.steps.resume(name)
        for name in [name for name in self.layers if name not in self.done]:  # no image reaches these
            self._fit(name)
        calls_after: Counter[str] = sum(gather_processes(self.calls_after), Counter())
        for name, row in self.rows.items():
            if calls := calls_after[name]:
                self.rows[name] = row.noting(f'{calls} later calls in these batches were not looked at')
        self.readers.merge_processes()
        return self.takers.agree(Takers.seen_by(self.readers, self.module, self.layers, self.obstacles))

    def _run(self, batch: Any, number: int) -> None:
        self.sample = Sample(seed=number, images=count_images(batch))
        self.readers.run(self.module, batch)

    def _call(self, name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        """Stands in for the forward of a layer: its first call in a run waits until the layer is fitted."""
        (x,) = (*args, *keywords.values())
        sample = self.sample
        if sample is None:  # the run of one image that shows who reads what
            self.single[name] = x.shape
            return forward(x)
        if name in self.done:
            self.calls_after[name] += 1
            return forward(x)
        with self.readers.paused():
            seen = self.vectors.setdefault(name, ImageVectors(Features(self.layers[name])))
            images_first = x.movedim(image_dimension(x, self.single.get(name), sample.images), 0)
            vectors = seen.features.vectors(sample, images_first, stride_of(self.stride, name))
            seen.add(vectors, sample.parts(vectors.shape[2]))
            self.steps.pause(name)
        self.sample = sample
        return forward(x if self.shift is None else x + self.shift.to(x))

    def _next(self) -> str | None:
        """Returns the first layer in the order of execution at which a batch of any process waits."""
        order = list(self.layers)
        own = min((order.index(str(name)) for name in self.steps.places), default=len(order))
        first = min(gather_processes(own))
        return order[first] if first < len(order) else None

    def _fit(self, name: str) -> None:
        """Fits one layer in place, or notes why it is skipped."""
        self.shift, layer = None, self.layers[name]
        with torch.autocast(layer.weight.device.type, enabled=False):
            reason = self._correct(name, layer)
        if reason:
            self.skipped[name] = reason
        self.done.add(name)
        if self.progress:
            self.progress(name)

    def _correct(self, name: str, layer: Layer) -> str:
        """Fits one layer in place; returns why not, or an empty text."""
        seen = self.vectors.pop(name, None) or ImageVectors(Features(layer))
        source = source_of(self.source, name, seen.features)
        if reason := why_not(layer, source, 'the training images'):
            return reason
        norm, note = self.takers.norms.get(name), ''
        if name in self.takers.unfit:
            return self.takers.unfit[name]
        takes_constant = layer.bias is not None or norm is not None
        if not takes_constant:
            source = source.about_zero()
            note = 'nothing takes a constant, so moments about zero are matched'
            if name in self.takers.reasons:
                note += f' ({self.takers.reasons[name]})'
        factor = source.factor(solving_dtype(layer))
        first, second = seen.halves(factor)
        target = first.merged(second)
        check_finite(name, target)
        if reason := why_not(layer, target, 'these images'):
            return reason
        if not first.count:
            single = 'a single image shows no difference between images'
            return single if self.images == 1 else 'its vectors cannot be told apart by image, or all images are alike'
        if reason := too_few(target, stride_of(self.stride, name), self.images):
            return reason
        size = source.mean.shape[1]
        if source.count <= size < target.count:
            return f'{source.count} vectors of the training images are too few for {size} channels'
        if not takes_constant:
            first, second, target = first.about_zero(), second.about_zero(), target.about_zero()
        support = find_support(source, (first, second), factor)
        strength = 1.0 if name == next(iter(self.layers)) else STRENGTH
        linear, constant = transport(source, target, support, solving_dtype(layer), strength)
        fold_map(layer, norm, linear, constant)
        if norm is not None and layer.bias is None and not fitted_on_output(layer):
            self.shift = before_map(linear, constant)[0]  # the present inputs were made before their LayerNorm changed
        torch.clear_autocast_cache()
        self.rows[name] = make_row(name, linear, constant, target, support=support, note=note, **self.keep)
        return ''


def image_dimension(x: Tensor, single: torch.Size | None, images: int) -> int:
    """Returns the dimension of a layer's input that counts the images: 1 for (tokens, images, C), 0 otherwise.

    Args:
        x: What the layer takes of some images.
        single: The shape of what it takes of one image, of the same size; None if that is not known.
        images: Number of images.
    """
    if single is None or x.dim() != 3 or len(single) != 3:
        return 0
    sequence_first = torch.Size([single[0], single[1] * images, single[2]])
    return int(images > 1 and x.shape == sequence_first)


def source_of(source: Mapping[str, Moments], name: str, features: Features) -> Moments:
    """Returns the moments of a layer in the training domain, on its device.

    Raises:
        CalibrationError: They are of other channels, or not finite.
    """
    moments = source[name]
    if tuple(moments.mean.shape) != features.shape:
        raise CalibrationError(
            f'the moments of {name} in source are of {moments.mean.numel()} channels, not {math.prod(features.shape)}'
        )
    if not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
        raise CalibrationError(f'the moments of {name} in source hold NaN or Inf; gather them again')
    return moments.to(features.layer.weight.device)


def why_not(layer: Layer, seen: Moments, images: str) -> str:
    """Returns why moments are not enough to fit a layer; empty if they are.

    Args:
        layer: The layer.
        seen: Its moments.
        images: What images they are of, as words.
    """
    info = torch.finfo(solving_dtype(layer))
    if not seen.count:
        return f'none of {images} reaches it'
    if seen.count == 1:
        return f'a single vector of {images} reaches it, which has no variance'
    if seen.variance <= (4 * info.eps) ** 2 * seen.mean.square().mean() + info.tiny / RIDGE:
        return f'it has no variance on {images}'
    return ''


def solving_dtype(layer: Layer) -> torch.dtype:
    """Returns the dtype in which the map of a layer is found: that of its weight, float32 at least."""
    return torch.promote_types(layer.weight.dtype, torch.float32)

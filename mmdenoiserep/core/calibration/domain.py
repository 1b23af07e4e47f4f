"""Fits the layers of a model to the domain of some unlabelled images, in one pass."""

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
from .maps import before_map, fold_map
from .match import FITS, transport
from .moments import CalibrationError, Moments, gather_processes
from .norms import find_norms
from .readers import Readers
from .report import CalibratedLayer, CalibrationReport, make_report, make_row
from .takers import Takers, find_obstacles, owned_tensors

MOST_PASSES = 5
"""Passes after which a fit gives up. One is enough if its first image shows who reads what, two if another one does."""


def fit_domain(
    module: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    source: Mapping[str, Moments],
    *,
    fit: str = 'full',
    prior: float = 0.0,
    stride: Stride = 1,
    spectra: bool = False,
    maps: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> CalibrationReport:
    """Fits layers of a model to the images of the place where it will run, in place.

    An affine map carries the moments of each layer's features to those in the training domain, see :func:`transport`,
    and is folded into the weights, see :func:`fold_map`. The layers follow each other in the order of execution, each
    fitted on the stream that the earlier ones correct, in one pass: the forwards of all batches pause at each layer
    until it is fitted. Meanwhile the features of all images at that place of the model are in memory.

    A layer that runs several times in a forward is fitted on its first call.

    Args:
        module: The model.
        layers: Layers of the model by name, first executed first, of :func:`select_layers`; the others stay.
        batches: What to call the module with, of any sizes; each process has its own.
        source: Moments in the training domain, of :func:`collect_moments` or :func:`load_moments`.
        fit: ``'full'``, ``'covariance'``, ``'diagonal'`` or ``'mean'``, see :func:`transport`.
        prior: Images that the source is worth, so that few images cannot wreck a model.
        stride: See :func:`collect_moments`.
        spectra: Whether the report has the spectra of all layers, which cost two decompositions each.
        maps: Whether the report has the maps of all layers.
        progress: Called with the name of each layer when it is done.

    Returns:
        A :class:`CalibrationReport`.

    Raises:
        CalibrationError: There is no layer or no image, the model has denoisers, the source or an option does not fit,
            the features of a layer are not finite, or no layer can be fitted. The model is as it was then, as after
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
    if prior < 0:
        raise CalibrationError(f'prior must be a number of images, 0 or more, got {prior}')
    if fit not in FITS:
        raise CalibrationError(f'fit must be one of {", ".join(FITS)}, got {fit!r}')
    if missing := next((name for name in layers if name not in source), None):
        raise CalibrationError(f'source has no moments of {missing}; gather them with the same targets')
    solver = Solver(source, fit, prior, dict(spectra=spectra, maps=maps))
    if iter(batches) is batches:
        batches = list(batches)  # a second pass may be needed
    owned = owned_tensors(module, layers)
    readers = Readers({**layers, **find_norms(module)}, owned)
    with all_or_nothing(tensor for _, tensor in owned if tensor is not None) as undo:
        for _ in range(MOST_PASSES):
            domain = DomainPass(module, layers, stride, solver, readers, progress)
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
        stride: See :func:`collect_moments`.
        solver: Finds the map of a layer.
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
        stride: Stride,
        solver: 'Solver',
        readers: Readers,
        progress: Callable[[str], Any] | None,
    ) -> None:
        self.module = module
        self.layers = layers
        self.stride = stride
        self.solver = solver
        self.readers = readers
        self.progress = progress
        self.obstacles = find_obstacles(module)  # before the forwards of the norms are replaced
        self.images = 0
        self.rows: dict[str, CalibratedLayer] = {}
        self.skipped: dict[str, str] = {}
        self.done: set[str] = set()
        self.features: dict[str, Features] = {}  # of the layers where batches wait
        self.shift: Tensor | None = None  # of the input of the layer whose batches go on
        self.calls_after: Counter[str] = Counter()  # of layers that were fitted before
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
        self.sample = Sample(seed=number)
        self.readers.run(self.module, batch)

    def _call(self, name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        """Stands in for the forward of a layer: its first call in a run waits until the layer is fitted."""
        (x,) = (*args, *keywords.values())
        sample = self.sample
        if sample is None:  # the run that shows who reads what
            return forward(x)
        if name in self.done:
            self.calls_after[name] += 1
            return forward(x)
        with self.readers.paused():
            if name not in self.features:
                with torch.inference_mode(False):  # this run's own mode may not be that of the others
                    self.features[name] = Features(self.layers[name])
            self.features[name].update(sample, x, stride_of(self.stride, name))
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
        target = (self.features.pop(name, None) or Features(layer)).moments()
        check_finite(name, target)
        if name in self.takers.unfit:
            return self.takers.unfit[name]
        source = self.solver.source_of(name, layer, target)
        if reason := self.solver.why_not(layer, source, target, stride_of(self.stride, name), self.images):
            return reason
        norm, note = self.takers.norms.get(name), ''
        if layer.bias is None and norm is None:
            note = 'nothing takes a constant, so moments about zero are matched'
            if name in self.takers.reasons:
                note += f' ({self.takers.reasons[name]})'
            source, target = source.about_zero(), target.about_zero()
        linear, constant = self.solver.solve(layer, source, target, self.images)
        fold_map(layer, norm, linear, constant)
        if norm is not None and layer.bias is None and not fitted_on_output(layer):
            self.shift = before_map(linear, constant)[0]  # the present inputs were made before their LayerNorm changed
        torch.clear_autocast_cache()
        self.rows[name] = self.solver.row(name, linear, constant, target, note)
        return ''


class Solver:
    """Finds the map of a layer from its moments.

    Args:
        source: Moments in the training domain by layer name.
        fit: See :func:`fit_domain`.
        prior: See :func:`fit_domain`.
        keep: What the report has of each layer, see :func:`make_row`.
    """

    def __init__(self, source: Mapping[str, Moments], fit: str, prior: float, keep: Mapping[str, bool]) -> None:
        self.source = source
        self.fit = fit
        self.prior = prior
        self.keep = keep

    def source_of(self, name: str, layer: Layer, target: Moments) -> Moments:
        """Returns the moments of a layer in the training domain, on its device.

        Raises:
            CalibrationError: They are of other channels, or not finite.
        """
        source = self.source[name]
        if source.mean.shape != target.mean.shape:
            raise CalibrationError(
                f'the moments of {name} in source are of {source.mean.numel()} channels, not {target.mean.numel()}'
            )
        if not (source.mean.isfinite().all() and source.scatter.isfinite().all()):
            raise CalibrationError(f'the moments of {name} in source hold NaN or Inf; gather them again')
        return source.to(layer.weight.device)

    def why_not(self, layer: Layer, source: Moments, target: Moments, stride: int, images: int) -> str:
        """Returns why moments are not enough to fit a layer; empty if they are.

        Args:
            layer: The layer.
            source: Its moments in the training domain.
            target: Its moments on these images.
            stride: One in so many vectors was taken.
            images: Number of these images.
        """
        size = target.mean.shape[1]
        accuracy = (4 * torch.finfo(solving_dtype(layer)).eps) ** 2
        for seen, place in ((source, 'the training images'), (target, 'these images')):
            if not seen.count:
                return f'none of {place} reaches it'
            if self.fit == 'mean':
                continue  # all it needs
            if seen.count == 1:
                return f'a single vector of {place} reaches it, which has no variance'
            if seen.covariance.diagonal(dim1=1, dim2=2).sum() <= accuracy * seen.mean.square().sum():
                return f'it has no variance on {place}'
        if self.fit == 'mean':
            return ''
        if reason := too_few(target, stride, images):
            return reason
        if source.count <= size < target.count:
            return f'{source.count} vectors of the training images are too few for {size} channels'
        return ''

    def solve(self, layer: Layer, source: Moments, target: Moments, images: int) -> tuple[Tensor, Tensor]:
        """Returns A and c, see :func:`transport`, in the precision of the layer, float32 at least."""
        prior = self.prior / (self.prior + images)
        return transport(source, target, self.fit, prior, solving_dtype(layer))

    def row(self, name: str, linear: Tensor, constant: Tensor, target: Moments, note: str) -> CalibratedLayer:
        """Returns the row of a layer in the report."""
        return make_row(name, linear, constant, target, note=note, **self.keep)


def solving_dtype(layer: Layer) -> torch.dtype:
    """Returns the dtype in which the map of a layer is found: that of its weight, float32 at least."""
    return torch.promote_types(layer.weight.dtype, torch.float32)

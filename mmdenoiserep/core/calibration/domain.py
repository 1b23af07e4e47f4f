"""Fits the layers of a model to the domain of some unlabelled images, one after the other."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..method.layers import DenoiseLayer, Layer
from ..method.probe import evaluating, run_model
from ..method.sample import Sample
from ..utils.intercept import intercepting
from ..utils.storage import shared_parameters
from .batches import count_images
from .collect import (
    SeenAll,
    check_finite,
    empty_moments,
    fitted_on_output,
    gather,
    sum_processes,
    too_few,
)
from .match import FITS, RANKED, transport
from .moments import CalibrationError, Moments, gather_processes
from .norms import find_norms, taker, why_not_norm
from .readers import Readers
from .report import CalibrationReport, make_report, make_row


def apply_map(layer: Layer, x: Tensor, linear: Tensor, constant: Tensor) -> Tensor:
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
        module: A model before the fit.
        maps: A and c by layer name.
    """
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in maps}

    def run(name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        x, *rest = (*args, *keywords.values())
        if fitted_on_output(layers[name]):
            return apply_map(layers[name], forward(x, *rest), *maps[name])
        return forward(apply_map(layers[name], x, *maps[name]), *rest)

    with intercepting(layers, run):
        yield


def fit_domain(
    module: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    source: Mapping[str, Moments],
    *,
    fit: str = 'full',
    rank: int | None = None,
    prior: float = 0.0,
    every: int = 1,
) -> CalibrationReport:
    """Fits layers of a model to the images of the place where it will run, in place: the maps are in the weights.

    An affine map carries the moments of each layer's features to those in the training domain, see :func:`transport`
    and :class:`DomainFit`. Layers follow each other in the order of execution, each fitted on the stream that the
    earlier ones correct: a single batch is run through the model once, and each layer is fitted when its turn comes;
    several batches once for each layer.

    Args:
        module: The model.
        layers: Layers of the model by name, first executed first, of :func:`select_layers`; the others stay.
        batches: What to call the module with; each process has its own.
        source: Moments in the training domain, of :func:`collect_moments`.
        fit: ``'full'``, ``'covariance'``, ``'diagonal'`` or ``'mean'``, see :func:`transport`.
        rank: Rank of the maps less the identity; None for full. Means and variances alone have none.
        prior: Images that the source is worth, so that few images cannot wreck a model.
        every: See :func:`collect_moments`.

    Returns:
        A :class:`CalibrationReport`.

    Raises:
        CalibrationError: There is no layer or no image, the model has denoisers, the source or an option does not fit,
            or no layer can be fitted. Nothing has been changed then. Or the features of a layer are not finite, which
            leaves the layers before it fitted.

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
    if rank is not None and rank < 1:
        raise CalibrationError(f'rank must be 1 or more, or None for full maps, got {rank}')
    for name, layer in layers.items():
        _check_source(name, layer, source)
    batches = list(batches) if iter(batches) is batches else batches  # several passes read them several times
    domain = DomainFit(module, layers, source, fit, rank, prior, every)
    domain.run(batches)
    rows = []
    for name in layers:
        if name in domain.fitted:
            fitted = domain.fitted[name]
            low = rank if fit in RANKED and rank is not None and rank < fitted.linear.shape[-1] else None
            rows.append(make_row(name, fitted.linear, fitted.constant, fitted.target, rank=low, note=fitted.note))
    return make_report('domain', domain.images, domain.passes, rows, domain.skipped)


def _check_source(name: str, layer: Layer, source: Mapping[str, Moments]) -> None:
    """Raises a CalibrationError if there are no usable moments of a layer."""
    if name not in source:
        raise CalibrationError(f'source has no moments of {name}; gather them with the same targets')
    expected, given = empty_moments(layer).mean, source[name]
    if given.mean.shape != expected.shape:
        raise CalibrationError(
            f'the moments of {name} in source are of {given.mean.numel()} channels, not {expected.numel()}'
        )
    if not (given.mean.isfinite().all() and given.scatter.isfinite().all()):
        raise CalibrationError(f'the moments of {name} in source hold NaN or Inf; gather them again')


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
        layers: The layers to fit, first executed first.
        source: Moments in the training domain by layer name.
        fit: See :func:`transport`.
        rank: Likewise.
        prior: Images that the source's moments are worth.
        every: See :func:`collect_moments`.

    Attributes:
        images: Images seen, in all processes.
        passes: How often they were run through the model.
        fitted: What was done, by layer name.
        skipped: Why a layer was left as it is, by its name.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        source: Mapping[str, Moments],
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
        self.skipped: dict[str, str] = {}
        self.norms = find_norms(module)
        self.takers: dict[str, Tensor] = {}  # by layer: the bias of its LayerNorm, the running mean of its BatchNorm
        self.no_taker: dict[str, str] = {}  # by layer: why its norm takes no constant
        self.owned = [
            *((name, tensor) for name, layer in layers.items() for tensor in (layer.weight, layer.bias)),
            *((name, taker(norm)) for name, norm in self.norms.items()),
        ]
        self.readers = Readers({**layers, **self.norms}, self.owned)

    def run(self, batches: Iterable[Any]) -> None:
        """Fits all layers: in turn on a single batch, else with a pass for each.

        Several layers in one pass would not do: each would take off again what the one before it takes off. A layer
        that runs several times in a forward needs a pass of its own as well.

        Raises:
            CalibrationError: There is no image, or the features of a layer are not finite.
        """
        size = getattr(batches, '__len__', lambda: 0)()
        if sum_processes(size != 1) or not self._in_turn(next(iter(batches))):  # the same in all processes
            self._pass_by_pass(batches)

    def _pass_by_pass(self, batches: Iterable[Any]) -> None:
        """Fits each layer with a pass of its own; the first one runs to its end, and shows who reads what."""
        calls: list[Counter[str]] = []
        for name, layer in self.layers.items():
            watched = not self.passes
            known = [seen[name] for seen in calls]
            moments, self.images = gather(
                self.module,
                batches,
                {name: layer},
                False,
                self.every,
                run=self.readers.run if watched else run_model,
                calls=known,
            )
            if not self.images:
                raise CalibrationError('there is no image to calibrate with')
            if watched:
                calls = self.readers.calls if len(set(map(_items, self.readers.calls))) == 1 else []
                self._find_takers()
            self._correct(name, moments[name])
            self.passes += 1

    def _in_turn(self, batch: Any) -> bool:
        """Fits each layer when the batch reaches it; returns False, with nothing changed, if that is not possible.

        That needs a model in which all layers run at most once, in all processes in the same order, and a batch that
        shows no more readers than its first image.
        """
        self.images = sum_processes(count_images(batch))
        if not self.images:
            raise CalibrationError('there is no image to calibrate with')
        with evaluating(self.module):
            one = batch[:1] if isinstance(batch, Tensor) else batch  # who reads what, one image shows
            self.readers.run(self.module, one)
        (calls,) = self.readers.calls
        self.readers.calls = []
        if sum_processes(any(calls[name] > 1 for name in self.layers)):
            return False
        self._find_takers()
        before = [(tensor, tensor.detach().clone()) for _, tensor in self.owned if tensor is not None]
        sample = Sample(self.every)
        all_layers = sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in self.module.modules())

        def reach(place: str) -> None:
            if len(set(gather_processes(place))) > 1:
                raise _OutOfTurn

        def end_behind_the_last() -> None:
            """Ends the run, unless it ends soon by itself: then a layer that runs again is still seen."""
            if len(self.fitted) + len(self.skipped) == len(self.layers) < all_layers:
                raise SeenAll

        def correct(name: str, x: Tensor) -> Tensor | None:
            moments = empty_moments(self.layers[name])
            moments.update(sample(self.layers[name], x))
            moments.merge_processes()
            with self.readers.paused():  # what a fit writes, the model does not read
                return self._correct(name, moments)

        reached: set[str] = set()

        def run(name: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
            (x,) = (*args, *keywords.values())
            layer = self.layers[name]
            reach(f'again {name}' if name in reached else name)
            if name in reached:
                raise _OutOfTurn
            reached.add(name)
            if not fitted_on_output(layer):
                shift = correct(name, x)
                end_behind_the_last()
                return forward(x if shift is None else x + shift.flatten().to(x))
            output = forward(x)
            correct(name, output)
            end_behind_the_last()
            if name in self.skipped:
                return output
            fitted = self.fitted[name]  # without a bias, the norm behind it has taken the constant
            constant = fitted.constant if layer.bias is not None else torch.zeros_like(fitted.constant)
            return apply_map(layer, output, fitted.linear, constant)

        try:
            with (
                evaluating(self.module),
                intercepting(self.layers, run),
                suppress(SeenAll),
            ):
                self.readers.run(self.module, batch)
                reach('')  # the end
            given, fitted = self.takers, self.fitted.keys() - self.skipped.keys()
            self._find_takers()
            if given.keys() != self.takers.keys() or fitted & self.skipped.keys():
                raise _OutOfTurn  # the batch showed readers that one image of it did not
        except _OutOfTurn:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            self.fitted, self.skipped, self.readers.calls = {}, {}, []
            return False
        for name in self.layers:
            if name not in reached:
                self._correct(name, empty_moments(self.layers[name]))
        self.passes = 1
        return True

    def _find_takers(self) -> None:
        """Finds the norms that take the constant of a layer without a bias, and the layers that can't be fitted."""
        self.readers.merge_processes()
        self.takers, self.no_taker = {}, {}
        tied = shared_parameters(self.module)
        shared = {name for name, tensor in self.owned if id(tensor) in tied}
        for name in self.layers:
            if name in self.readers.read_elsewhere | shared:
                self.skipped[name] = 'its weight or bias is used outside of its own forward'
        on_output = {name for name, layer in self.layers.items() if fitted_on_output(layer)}
        for giver, reader in self.readers.pairs().items():
            if giver in on_output and isinstance(self.norms.get(reader), _BatchNorm):
                layer, name = giver, reader
            elif reader in self.layers.keys() - on_output and isinstance(self.norms.get(giver), nn.LayerNorm):
                layer, name = reader, giver
            else:
                continue
            tensor, reason = taker(self.norms[name]), why_not_norm(self.norms[name])
            if not reason and name in self.readers.read_elsewhere | shared:
                reason = 'what would take it is used by others'
            if reason:
                self.no_taker[layer] = f'{name}, {reason}'
            elif tensor is not None:
                self.takers[layer] = tensor

    @torch.no_grad()
    def _correct(self, name: str, target: Moments) -> Tensor | None:
        """Fits one layer in place; returns what must be added to its present input, for a LayerNorm has changed."""
        check_finite(name, target)
        layer, norm = self.layers[name], self.takers.get(name)
        source = self.source[name].to(target.mean.device)  # a file's moments are on the CPU
        if name in self.skipped:
            return None
        if reason := self._why_not(layer, source, target):
            self.skipped[name] = reason
            return None
        weight = layer.weight.detach().to(torch.float64, copy=True)  # a copy, for the weight is overwritten
        bias: Tensor | None = layer.bias
        prior = self.prior / (self.prior + self.images)
        linear, constant = transport(source, target, self.fit, self.rank, prior)
        note, shift = '', None
        if bias is None and norm is None:
            note = 'no bias or norm takes the shift of the mean, so it is left out'
            if name in self.no_taker:
                note = f'no bias takes the shift of the mean, so it is left out ({self.no_taker[name]})'
            constant = torch.zeros_like(constant)
        if fitted_on_output(layer):
            layer.weight.copy_((linear @ weight.reshape(*linear.shape[:2], -1)).reshape(weight.shape))
            if bias is not None:
                bias.copy_((linear @ bias.double().reshape(*linear.shape[:2], 1)).flatten() + constant.flatten())
            elif norm is not None:
                norm.sub_(constant.flatten())
        else:
            layer.weight.copy_(weight @ linear[0])
            if bias is not None:
                bias.add_(weight @ constant[0])
            elif norm is not None:
                shift = torch.linalg.solve(linear, constant[..., None])[..., 0]
                norm.add_(shift[0])
        self.fitted[name] = FittedLayer(linear, constant, target, note)
        return shift

    def _why_not(self, layer: Layer, source: Moments, target: Moments) -> str:
        """Returns why the moments of a layer are not enough to fit it; empty if they are."""
        size = target.mean.shape[1]
        accuracy = (4 * torch.finfo(torch.promote_types(layer.weight.dtype, torch.float32)).eps) ** 2
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
        if reason := too_few(target, self.every, self.images):
            return reason
        if source.count <= size < target.count:
            return f'{source.count} vectors of the training images are too few for {size} channels'
        return ''


class _OutOfTurn(BaseException):
    """A layer runs for a second time, or the processes do not reach the same layer."""


def _items(counts: Counter[str]) -> frozenset:
    return frozenset(counts.items())

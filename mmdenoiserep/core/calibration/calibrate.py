"""Denoisers without training: from the moments of a layer's features, in one pass over unlabelled images."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .closed_form import closed_form
from ..method.denoiser import correction_matrix
from .domain import DomainFit
from .collect import denoised_layers, empty_moments, gather, too_few
from ..method.layers import DenoiseLayer
from .moments import CalibrationError, Moments
from ..utils.table import format_table
from .match import FITS, RANKED

MODES = ('schedule', 'domain')


@dataclass(frozen=True)
class CalibratedLayer:
    """One row of the report.

    Attributes:
        name: Name of the layer.
        timestep: t.
        rank: Rank of the map less the identity; None where it is not low.
        moved: ``E|x' - x|^2 / E|x - mu|^2``: how far the features move, as a share of their variance.
        linear: A of the map ``x' = A x + c``, float64, (groups, size, size): on the layer's input, in domain mode on
            the output of a convolution.
        constant: c, float64, (groups, size).
        before: Eigenvalues of the features' covariance, ascending, float64.
        after: The same of the corrected features.
        start: Schedule mode: the loss of the denoiser as it was, on the gathered features.
        loss: Schedule mode: the loss of the denoiser now.
        optimum: Schedule mode: the least loss that a denoiser of full rank can have on them.
        note: What could not be done, or empty.
    """

    name: str
    timestep: int
    rank: int | None
    moved: float
    linear: Tensor
    constant: Tensor
    before: Tensor
    after: Tensor
    start: float | None = None
    loss: float | None = None
    optimum: float | None = None
    note: str = ''


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`calibrate` did; ``print`` it for a table.

    Attributes:
        mode: ``'schedule'`` or ``'domain'``.
        images: Images seen, in all processes.
        passes: How often they were run through the model.
        layers: The calibrated layers, first executed first.
        skipped: Why a layer was left as it is, by its name.
    """

    mode: str
    images: int
    passes: int
    layers: tuple[CalibratedLayer, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        header = ['layer', 'step', 'rank', 'variance moved', '']
        rows = [[r.name, str(r.timestep), str(r.rank or '-'), f'{r.moved:.2e}', r.note] for r in self.layers]
        if self.mode == 'schedule':
            losses = [(layer.start, layer.loss, layer.optimum) for layer in self.layers]
            rows.append(['mean', '', '', '', ''])
            losses.append(tuple(sum(column) / len(self.layers) for column in zip(*losses, strict=True)))
            header[4:4] = 'loss before', 'loss', 'optimum of full rank'
            for row, values in zip(rows, losses, strict=True):
                row[4:4] = [f'{value:.6f}' for value in values]
        passes = f'{self.passes} pass{"es" if self.passes > 1 else ""}'
        rows += [[name, *'-' * (len(header) - 2), f'skipped: {why}'] for name, why in self.skipped.items()]
        return (
            f'{format_table(tuple(header), [tuple(row) for row in rows])}\n'
            f'{len(self.layers)} layers calibrated ({self.mode}) on {self.images} images in {passes}'
        )


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    mode: str = 'schedule',
    source: Mapping[str, Moments] | None = None,
    *,
    layers: Collection[str] | None = None,
    fit: str = 'full',
    rank: int | None = None,
    prior: float = 0.0,
    every: int = 1,
) -> CalibrationReport:
    """Sets the denoisers of a model from unlabelled images, in place, with no training at all.

    ``schedule`` solves the loss of the paper's denoisers exactly, see :func:`closed_form`, at the rank that they have.

    ``domain`` fits each layer to the images of the place where the model will run: an affine map carries the moments of
    its features to those in the training domain, see :func:`transport` and :class:`DomainFit`. Layers follow each other
    in the order of execution, each fitted on the stream that the earlier ones correct: a single batch is run through
    the model once, and each layer is fitted when its turn comes; several batches once for each layer. The maps are in
    the weights afterwards, and the denoisers are zero: :func:`fuse_model` returns the vanilla model.

    Args:
        module: A model that :func:`apply_denoiserep` converted.
        batches: What to call the module with; each process has its own.
        mode: ``'schedule'`` or ``'domain'``.
        source: Moments in the training domain, of :func:`collect_moments`; domain mode needs them.
        layers: Names of the layers to calibrate; None takes all. The others are left as they are.
        fit: Domain mode: ``'full'``, ``'covariance'``, ``'diagonal'`` or ``'mean'``, see :func:`transport`.
        rank: Domain mode: rank of the maps less the identity; None for full. Means and variances alone have none.
        prior: Images that a prior is worth, so that few images cannot wreck a model: the source in domain mode, equal
            variances of unrelated channels in schedule mode.
        every: See :func:`collect_moments`.

    Returns:
        A :class:`CalibrationReport`.

    Raises:
        CalibrationError: The module has no denoisers, a name or the mode is unknown, the source is missing or does not
            fit, there is no image, no layer can be calibrated, or in domain mode a denoiser is not zero. Nothing has
            been changed then. Or the features of a layer are not finite, which in domain mode leaves the layers before
            it fitted.
    """
    chosen = denoised_layers(module)
    if layers is not None:
        if unknown := sorted(set(layers) - set(chosen)):
            raise CalibrationError(f'{unknown[0]} is no denoised layer of the model')
        chosen = {name: layer for name, layer in chosen.items() if name in set(layers)}
    if prior < 0:
        raise CalibrationError(f'prior must be a number of images, 0 or more, got {prior}')
    if mode == 'schedule':
        return _fit_schedule(module, batches, chosen, prior, every)
    if mode != 'domain':
        raise CalibrationError(f'mode must be one of {", ".join(MODES)}, got {mode!r}')
    if fit not in FITS:
        raise CalibrationError(f'fit must be one of {", ".join(FITS)}, got {fit!r}')
    if rank is not None and rank < 1:
        raise CalibrationError(f'rank must be 1 or more, or None for full maps, got {rank}')
    if source is None:
        raise CalibrationError("mode='domain' needs source, the moments in the training domain (collect_moments)")
    for name, layer in chosen.items():
        if name not in source:
            raise CalibrationError(f'source has no moments of {name}; gather them with the same targets')
        expected, given = empty_moments(layer).mean, source[name].mean
        if given.shape != expected.shape:
            raise CalibrationError(
                f'the moments of {name} in source are of {given.numel()} channels, not {expected.numel()}'
            )
        here = source[name].to(layer.weight.device)
        if not (here.mean.isfinite().all() and here.scatter.isfinite().all()):
            raise CalibrationError(f'the moments of {name} in source hold NaN or Inf; gather them again')
        if not layer.denoiser.is_zero():
            raise CalibrationError(f'the denoiser of {name} is not zero; fuse the model and convert it again')
    batches = list(batches) if iter(batches) is batches else batches  # several passes read them several times
    domain = DomainFit(module, chosen, source, fit, rank, prior, every)
    domain.run(batches)
    rows = []
    for name, layer in chosen.items():
        if name in domain.fitted:
            fitted = domain.fitted[name]
            low = rank if fit in RANKED and rank is not None and rank < fitted.linear.shape[-1] else None
            rows.append(_row(name, layer, fitted.linear, fitted.constant, fitted.target, rank=low, note=fitted.note))
    return _report(mode, domain.images, domain.passes, rows, domain.skipped)


def _report(
    mode: str, images: int, passes: int, rows: Sequence[CalibratedLayer], skipped: Mapping[str, str]
) -> CalibrationReport:
    """Returns the report; raises a CalibrationError if no layer was calibrated."""
    if not rows:
        name, reason = next(iter(skipped.items()), ('', 'none is named'))
        raise CalibrationError(f'no layer was calibrated: {name}{": " if name else ""}{reason}')
    return CalibrationReport(mode, images, passes, tuple(rows), skipped)


def _fit_schedule(
    module: nn.Module, batches: Iterable[Any], layers: Mapping[str, DenoiseLayer], prior: float, every: int
) -> CalibrationReport:
    moments, images = gather(module, batches, layers, True, every)
    if not images:
        raise CalibrationError('there is no image to calibrate with')
    rows, skipped = [], {}
    for name, seen in moments.items():
        if reason := too_few(seen, every, images):
            skipped[name] = reason
            continue
        layer = layers[name]
        step, denoiser = layer.reverse_step, layer.denoiser
        rank = denoiser.up.shape[-1] if hasattr(denoiser, 'up') else None
        shrunk = _towards_equal_variances(seen, prior / (prior + images))
        second = shrunk + seen.mean[:, :, None] * seen.mean[:, None, :]
        with_bias = denoiser.bias is not None
        start = _loss(layer, {key: p.detach().double() for key, p in denoiser.named_parameters()}, seen)
        solution = closed_form(seen.mean, second, step, rank, with_bias)
        with torch.no_grad():
            for key, parameter in denoiser.named_parameters():
                parameter.copy_(solution[key])
        best = solution
        if prior or rank is not None:
            best = closed_form(seen.mean, seen.second_moment, step, None, with_bias)
        constant = -solution['bias'].reshape(seen.mean.shape) if with_bias else torch.zeros_like(seen.mean)
        linear = torch.eye(seen.mean.shape[1], dtype=torch.float64, device=seen.mean.device) - correction_matrix(
            solution
        )
        losses = dict(start=start, loss=_loss(layer, solution, seen), optimum=_loss(layer, best, seen))
        rows.append(_row(name, layer, linear, constant, seen, rank=rank, **losses))
    return _report('schedule', images, 1, rows, skipped)


def _towards_equal_variances(moments: Moments, prior: float) -> Tensor:
    """Returns the covariance with a share of the prior, the mean variance of the layer in every direction."""
    covariance = moments.covariance
    equal = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.lerp(covariance, equal * covariance.diagonal(dim1=1, dim2=2).mean(), prior)


def _loss(layer: DenoiseLayer, parameters: Mapping[str, Tensor], moments: Moments) -> float:
    """Returns the expectation of :meth:`DenoiseLayer.denoise_loss` over features with these moments."""
    step = layer.reverse_step
    matrix = correction_matrix(parameters)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    prediction = (matrix + step.c3_minus_1 * identity) / step.c1
    shift = parameters['bias'].reshape(moments.mean.shape) / step.c1 if 'bias' in parameters else 0 * moments.mean
    spread = (prediction @ moments.covariance * prediction).sum() * step.signal**2
    mean = step.signal * (prediction @ moments.mean[..., None])[..., 0] + shift
    residual = identity - step.noise * prediction
    return ((spread + mean.square().sum() + residual.square().sum()) / moments.mean.numel()).item()


def _row(
    name: str, layer: DenoiseLayer, linear: Tensor, constant: Tensor, moments: Moments, **rest: Any
) -> CalibratedLayer:
    covariance = moments.covariance
    change = linear - torch.eye(linear.shape[-1], dtype=linear.dtype, device=linear.device)
    shift = (change @ moments.mean[..., None])[..., 0] + constant
    variance = covariance.diagonal(dim1=1, dim2=2).sum().clamp_min(torch.finfo(torch.float64).tiny)
    moved = ((change @ covariance * change).sum() + shift.square().sum()) / variance
    before = torch.linalg.eigvalsh(covariance).flatten().sort().values
    after = torch.linalg.eigvalsh(linear @ covariance @ linear.mT).flatten().sort().values
    return CalibratedLayer(
        name,
        layer.timestep,
        moved=moved.item(),
        linear=linear,
        constant=constant,
        before=before,
        after=after,
        **rest,
    )

"""Denoisers without training: the optimum of their loss, from the moments of the features, in one pass."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..method.correction import Correction
from ..method.layers import DenoiseLayer
from .closed_form import closed_form
from .collect import Stride, gather, stride_of, too_few
from .moments import CalibrationError, Moments
from .report import CalibrationReport, make_report, make_row


def solve_denoisers(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Collection[str] | None = None,
    prior: float = 0.0,
    stride: Stride = 1,
    spectra: bool = False,
    maps: bool = False,
) -> CalibrationReport:
    """Sets the denoisers of a model to the exact optimum of their loss on unlabelled images, in place.

    See :func:`closed_form`; each denoiser keeps its rank.

    Args:
        module: A model that :func:`apply_denoiserep` converted.
        batches: What to call the module with; each process has its own.
        layers: Names of the denoised layers to solve for; None takes all. The others are left as they are.
        prior: Images that a prior of equal variances in unrelated channels is worth.
        stride: See :func:`collect_moments`.
        spectra: Whether the report has the spectra of all layers, which cost two decompositions each.
        maps: Whether the report has the maps of all layers.

    Returns:
        A :class:`CalibrationReport`.

    Raises:
        CalibrationError: The module has no denoisers, a name is unknown, there is no image, no layer can be solved
            for, or features are not finite. Nothing has been changed then.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> images = torch.randn(64, 3, 2, 2)
        >>> _ = apply_denoiserep(model, 'all', example_input=images)
        >>> report = solve_denoisers(model, [images])
        >>> report.layers[0].loss < report.layers[0].start
        True
    """
    chosen = denoised_layers(module)
    if layers is not None:
        if unknown := sorted(set(layers) - set(chosen)):
            raise CalibrationError(f'{unknown[0]} is no denoised layer of the model')
        chosen = {name: layer for name, layer in chosen.items() if name in set(layers)}
    if prior < 0:
        raise CalibrationError(f'prior must be a number of images, 0 or more, got {prior}')
    moments, images = gather(module, batches, chosen, True, stride)  # type: ignore[arg-type]
    if not images:
        raise CalibrationError('there is no image to calibrate with')
    rows, skipped = [], {}
    for name, seen in moments.items():
        if reason := too_few(seen, stride_of(stride, name), images):
            skipped[name] = reason
            continue
        layer = chosen[name]
        before = layer.denoiser.correction()
        with_bias = before.bias is not None
        shrunk = _towards_equal_variances(seen, prior / (prior + images))
        second = shrunk + seen.mean[:, :, None] * seen.mean[:, None, :]  # (groups, C/g, C/g)
        start = _loss(layer, before.to(torch.float64), seen)
        solution = Correction.of(closed_form(seen.mean, second, layer.reverse_step, before.rank, with_bias))
        with torch.no_grad():
            for key, parameter in layer.denoiser.named_parameters():
                parameter.copy_(solution.tensors[key])
        best = solution
        if prior or before.rank is not None:
            best = Correction.of(closed_form(seen.mean, seen.second_moment, layer.reverse_step, None, with_bias))
        constant = torch.zeros_like(seen.mean) if solution.bias is None else -solution.bias.reshape(seen.mean.shape)
        linear = torch.eye(seen.mean.shape[1], dtype=torch.float64, device=seen.mean.device) - solution.matrix()
        losses = dict(start=start, loss=_loss(layer, solution, seen), optimum=_loss(layer, best, seen))
        rows.append(make_row(name, linear, constant, seen, rank=before.rank, spectra=spectra, maps=maps, **losses))
    return make_report('schedule', images, rows, skipped)


def denoised_layers(module: nn.Module) -> dict[str, DenoiseLayer]:
    """Returns the denoised layers by name, first executed first.

    Raises:
        CalibrationError: There is none.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, DenoiseLayer)}
    if not found:
        raise CalibrationError('the model has no denoisers; convert it with apply_denoiserep first')
    return dict(sorted(found.items(), key=lambda item: -item[1].timestep))


def _towards_equal_variances(moments: Moments, prior: float) -> Tensor:
    """Returns the covariance with a share of the prior, the mean variance of the layer in every direction."""
    covariance = moments.covariance
    equal = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.lerp(covariance, equal * covariance.diagonal(dim1=1, dim2=2).mean(), prior)


@torch.no_grad()
def _loss(layer: DenoiseLayer, correction: Correction, moments: Moments) -> float:
    """Returns the expectation of :meth:`DenoiseLayer.denoise_loss` over features with these moments."""
    step = layer.reverse_step
    matrix = correction.matrix()
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    prediction = (matrix + step.c3_minus_1 * identity) / step.c1
    shift = torch.zeros_like(moments.mean)
    if correction.bias is not None:
        shift = correction.bias.reshape(moments.mean.shape) / step.c1
    spread = (prediction @ moments.covariance * prediction).sum() * step.signal**2
    mean = step.signal * (prediction @ moments.mean[..., None])[..., 0] + shift
    residual = identity - step.noise * prediction
    return ((spread + mean.square().sum() + residual.square().sum()) / moments.mean.numel()).item()

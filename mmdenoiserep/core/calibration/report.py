"""What a calibration did to each layer, as data and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..utils.table import format_table
from .match import Support
from .moments import CalibrationError, Moments


@dataclass(frozen=True)
class CalibratedLayer:
    """One row of the report.

    Attributes:
        name: Name of the layer.
        moved: ``E|x' - x|^2 / E|x - mu|^2``: how far the features move, as a share of their variance.
        rank: Schedule mode: rank of the denoiser; None for full.
        support: Domain mode: how much of the differences of covariance and mean is corrected, see :func:`find_support`.
        start: Schedule mode: the loss of the denoiser as it was, on the gathered features.
        loss: Schedule mode: the loss of the denoiser now.
        optimum: Schedule mode: the least loss that a denoiser of full rank can have on them.
        linear: A of the map ``x' = A x + c``, (groups, size, size), where asked for: on the layer's input, in domain
            mode on the output of a convolution.
        constant: c, float64, (groups, size), where asked for.
        before: Eigenvalues of the features' covariance, ascending, float64, where asked for.
        after: Eigenvalues of the corrected features' covariance, where asked for.
        note: What could not be done, or empty.
    """

    name: str
    moved: float
    rank: int | None = None
    support: Support | None = None
    start: float | None = None
    loss: float | None = None
    optimum: float | None = None
    linear: Tensor | None = None
    constant: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    note: str = ''

    def noting(self, note: str) -> 'CalibratedLayer':
        """Returns the row with one more note."""
        return replace(self, note='; '.join(filter(None, [self.note, note])))


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`solve_denoisers` or :func:`fit_domain` did; ``print`` it for a table.

    Attributes:
        mode: ``'schedule'`` (solved denoisers) or ``'domain'`` (a domain fit).
        images: Images seen, in all processes.
        layers: The calibrated layers, first executed first.
        skipped: Why a layer was left as it is, by its name.
    """

    mode: str
    images: int
    layers: tuple[CalibratedLayer, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        header = ['layer', 'variance moved', '']
        rows = [[layer.name, f'{layer.moved:.2e}', layer.note] for layer in self.layers]
        if self.mode == 'schedule':
            ranks = [*(str(layer.rank or '-') for layer in self.layers), '']
            losses = [(layer.start, layer.loss, layer.optimum) for layer in self.layers]
            rows.append(['mean', '', ''])
            losses.append(tuple(sum(column) / len(self.layers) for column in zip(*losses, strict=True)))
            header[1:2] = 'rank', 'variance moved', 'loss before', 'loss', 'optimum of full rank'
            for row, rank, values in zip(rows, ranks, losses, strict=True):
                row[1:2] = [rank, row[1], *(f'{value:.6f}' for value in values)]
        else:
            header[1:1] = 'covariance corrected', 'mean corrected'
            for row, layer in zip(rows, self.layers, strict=True):
                row[1:1] = [f'{share:.0%}' for share in layer.support] if layer.support else ['', '']
        rows += [[name, *'-' * (len(header) - 2), f'skipped: {why}'] for name, why in self.skipped.items()]
        return (
            f'{format_table(tuple(header), [tuple(row) for row in rows])}\n'
            f'{len(self.layers)} layers calibrated ({self.mode}) on {self.images} images'
        )


def make_report(
    mode: str, images: int, rows: Sequence[CalibratedLayer], skipped: Mapping[str, str]
) -> CalibrationReport:
    """Returns the report; raises a CalibrationError if no layer was calibrated."""
    if not rows:
        name, reason = next(iter(skipped.items()), ('', 'none is named'))
        raise CalibrationError(f'no layer was calibrated: {name}{": " if name else ""}{reason}')
    return CalibrationReport(mode, images, tuple(rows), skipped)


def make_row(
    name: str,
    linear: Tensor,
    constant: Tensor,
    moments: Moments,
    *,
    spectra: bool = False,
    maps: bool = False,
    **rest: Any,
) -> CalibratedLayer:
    """Returns the row of a layer with the map ``x' = A x + c``.

    Args:
        name: Name of the layer.
        linear: A, (groups, size, size).
        constant: c, float64, (groups, size).
        moments: Moments of x.
        spectra: Whether the row has the spectra of x and x'.
        maps: Whether the row has A and c.
        **rest: The other attributes of :class:`CalibratedLayer`.
    """
    covariance = moments.covariance.to(linear.dtype)
    change = linear - torch.eye(linear.shape[-1], dtype=linear.dtype, device=linear.device)
    shift = (change.double() @ moments.mean[..., None])[..., 0] + constant
    variance = moments.covariance.diagonal(dim1=1, dim2=2).sum().clamp_min(torch.finfo(torch.float64).tiny)
    moved = ((change @ covariance * change).sum() + shift.square().sum()) / variance
    if maps:
        rest |= dict(linear=linear, constant=constant)
    if spectra:
        rest |= dict(before=_spectrum(covariance), after=_spectrum(linear @ covariance @ linear.mT))
    return CalibratedLayer(name, moved=moved.item(), **rest)


def _spectrum(covariance: Tensor) -> Tensor:
    """Returns the eigenvalues of all groups, ascending, float64."""
    return torch.linalg.eigvalsh(covariance).flatten().sort().values.double()

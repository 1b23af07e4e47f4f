"""What follows a calibration: warnings, the check of the weights, the picture of the spectra."""

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import torch
from torch import Tensor, nn

from mmdenoiserep.core import CalibrationReport, Moments, Verification, explicit_maps, verify_fusion
from mmdenoiserep.core.calibration.safety import FEW, MANY, early_half

LARGE = 0.5
"""How far a layer's features may move without a warning, as a share of their variance.

On Fashion-MNIST the first layer moves by 0.02 to 0.3 for noise, blur and the like, and by 0.7 to 8 for inverted images,
mere noise and a contrast lowered to 0.3.
"""


def warnings_of(report: CalibrationReport, layers: Sequence[str]) -> list[str]:
    """Returns what the user of a fit should know, one sentence each.

    Args:
        report: What was done.
        layers: Names of all layers of the model, first executed first.
    """
    if report.mode != 'domain':
        return []
    sentences = []
    count = len(report.layers)
    least = MANY if count > len(early_half(layers)) else FEW
    if count > 1 and report.images < least:
        sentences.append(
            f'{report.images} images are few for {count} layers (from {least} on); gather more, or leave the choice '
            'of the layers to this tool'
        )
    first, large = report.layers[0], [layer for layer in report.layers if layer.moved > LARGE]
    if first.moved > LARGE and first.name == layers[0]:
        sentences.append(
            f'{first.name} moves by {first.moved:.2f} times its variance: the images look like another data set '
            'altogether, or like very different light; look at them before you deploy this'
        )
    elif large:
        worst = max(large, key=lambda layer: layer.moved)
        sentences.append(
            f'{len(large)} of {count} layers move by more than {LARGE} times their variance (most: {worst.name}, '
            f'{worst.moved:.2f}); evaluate on a few labelled images before you deploy this'
        )
    return sentences


def verify_maps(before: nn.Module, after: nn.Module, report: CalibrationReport, images: Tensor) -> Verification:
    """Compares a fitted backbone with the one before, in which the maps run as layers of their own.

    Args:
        before: Backbone with the original weights.
        after: Backbone with the maps in its weights.
        report: What :func:`mmdenoiserep.calibrate` returned.
        images: (B, C, H, W).
    """
    with explicit_maps(before, {layer.name: (layer.linear, layer.constant) for layer in report.layers}):
        return verify_fusion(before, after, images)


def draw_spectra(report: CalibrationReport, file: BinaryIO, source: Mapping[str, Moments] | None = None) -> None:
    """Writes a picture of the variances along the principal axes of up to nine layers, before and after.

    Args:
        report: What was done.
        file: Gets the picture, PNG.
        source: Moments in the training domain, drawn beside them.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    count = min(9, len(report.layers))
    chosen = [report.layers[i * (len(report.layers) - 1) // max(count - 1, 1)] for i in range(count)]
    columns = min(3, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout='constrained')
    for axes, layer in zip(grid.flat, chosen, strict=False):
        curves = {'these images': layer.before, 'corrected': layer.after}
        if source:
            curves['training domain'] = torch.linalg.eigvalsh(source[layer.name].covariance).flatten().sort().values
        for (label, values), style in zip(curves.items(), ('-', '--', ':'), strict=False):
            axes.semilogy(values.flip(0).clamp_min(values.max() * 1e-8).cpu(), style, label=label)
        axes.set_title(layer.name, fontsize=8)
    for axes in list(grid.flat)[count:]:
        axes.axis('off')
    grid[0, 0].legend()
    figure.supxlabel('principal axis')
    figure.supylabel('variance')
    figure.savefig(file, format='png', dpi=100)
    plt.close(figure)

"""Draws tables and figures: signal-to-noise ratios, spectra, embeddings, feature maps, attention, predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..core import CalibrationReport, Moments, format_table
from .visualization import MOST_STAGES, VARIANTS, ImageView, LayerStatistics, pick_evenly

ImageViews = Sequence[Mapping[tuple[str, str], ImageView]]
"""Some images, each seen by both models, clean and corrupted, see ``VARIANTS``."""
LABELS = dict(before='before', after='after', restored='restored: after, against clean before')
COLOURS = dict(before='#d1242f', after='#0969da', restored='#2a9d3a')
SETS = {('before', 'clean'): '0.35', ('before', 'corrupted'): '#d1242f', ('after', 'corrupted'): '#2a9d3a'}
"""The variants that the spectra and the embedding compare, and their colours."""
WIDTH = 1.9
"""Width of a picture in inches."""
HEAT = LinearSegmentedColormap.from_list('heat', [(1, 0.85, 0.2, 0), (1, 0.3, 0, 0.6), (0.85, 0, 0, 0.85)])
"""Color map from transparent to red, drawn over an image."""


def table(statistics: LayerStatistics) -> str:
    """Returns a table of the signal-to-noise ratio of every layer in decibels, in the order of execution."""
    rows = []
    for name, kind in statistics.types.items():
        before, after, restored = (statistics.ratios[key][name].decibels for key in LABELS)
        gains = (f'{value - before:+.2f}' for value in (after, restored))
        rows.append((name, kind, *(f'{value:.2f}' for value in (before, after, restored)), *gains))
    header = ('layer', 'type', 'SNR before (dB)', 'after', 'restored', 'after - before', 'restored - before')
    return f'{format_table(header, rows)}\nsampled {statistics.strides} of the vectors'


def write_figures(folder: Path, statistics: LayerStatistics, views: ImageViews, severity: str) -> list[str]:
    """Writes all figures as PNG files.

    Args:
        folder: Existing folder to write into.
        statistics: Statistics of the layers, from ``Visualization.measure``.
        views: ImageViews of a few images, from ``Visualization.look``.
        severity: Corruption and its severity, for the titles.

    Returns:
        The names of the files.
    """
    figures = {
        'signal_to_noise': draw_ratios(statistics, severity),
        'spectra': draw_spectra(statistics, severity),
        'embedding': draw_embedding(statistics, severity),
        **{f'features_{i}': draw_features(views, i - 1, severity) for i in range(1, len(views) + 1)},
    }
    first = views[0]['before', 'clean']
    if first.attention is not None:
        figures['attention'] = draw_attention(views, severity)
    if first.prediction is not None:
        figures['predictions'] = draw_predictions(views, severity)
    for name, figure in figures.items():
        figure.savefig(folder / f'{name}.png', dpi=100)
    return [f'{name}.png' for name in figures]


def draw_ratios(statistics: LayerStatistics, severity: str) -> Figure:
    """Plots the signal-to-noise ratio of every layer."""
    names = list(statistics.types)
    figure = Figure(figsize=(max(6, 0.22 * len(names)), 4.5), layout='constrained')
    axes = figure.subplots()
    for key, style in zip(LABELS, ('o-', 's-', '^--'), strict=True):
        values = [statistics.ratios[key][name].decibels for name in names]
        axes.plot(values, style, color=COLOURS[key], label=LABELS[key], markersize=4, linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set(title=f'signal-to-noise ratio of the layers, {severity}', ylabel='SNR (dB)')
    axes.grid(axis='y', alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_spectra(statistics: LayerStatistics, severity: str) -> Figure:
    """Plots the eigenvalues of the covariance of some layers' outputs."""
    layers = {
        name: {
            ', '.join(variant): (torch.linalg.eigvalsh(statistics.moments[variant][name].covariance).flatten(), colour)
            for variant, colour in SETS.items()
        }
        for name in statistics.moments['before', 'clean']
    }
    figure = _spectra_grid(layers, 'variance (squared units of the feature)')
    figure.suptitle(f'spectra of the layers, {severity}')
    return figure


def _spectra_grid(layers: Mapping[str, Mapping[str, tuple[Tensor, Any]]], ylabel: str) -> Figure:
    """Plots eigenvalues in descending order, one panel for each layer.

    Args:
        layers: By layer and label: the eigenvalues, (C,), and a colour.
        ylabel: Label of the axis of the eigenvalues.
    """
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(4.5, 3 * columns), 2.4 * rows + 0.7), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, spectra) in zip(grid.flat, layers.items(), strict=False):
        for (label, (values, colour)), style in zip(spectra.items(), ('-', '--', ':'), strict=False):
            values = values.sort(descending=True).values.cpu()
            axes.semilogy(values.clamp_min(values[0] * 1e-8), style, color=colour, label=label)
        axes.set_title(name, fontsize=8)
    for axes in list(grid.flat)[len(layers) :]:
        axes.axis('off')
    grid[0, 0].legend(fontsize=7)
    figure.supxlabel('principal axis (number)')
    figure.supylabel(ylabel)
    return figure


def draw_calibration(report: CalibrationReport, source: Mapping[str, Moments] | None = None) -> Figure:
    """Plots the spectra of up to nine layers before and after a calibration.

    Args:
        report: Report of the calibration.
        source: Moments in the training domain by layer name; their spectra are added.
    """
    chosen = {layer.name: layer for layer in report.layers}
    layers: dict[str, dict[str, tuple[Tensor, Any]]] = {}
    for name in pick_evenly(list(chosen), 9):
        layers[name] = {'these images': (chosen[name].before, None), 'corrected': (chosen[name].after, None)}
        if source:
            layers[name]['training domain'] = (torch.linalg.eigvalsh(source[name].covariance).flatten(), None)
    return _spectra_grid(layers, 'variance')


def draw_embedding(statistics: LayerStatistics, severity: str) -> Figure:
    """Plots a t-SNE of the embeddings: clean and corrupted images before, corrupted images after.

    The titles give the share of corrupted images whose nearest clean neighbour, in all dimensions, is the same image.
    """
    from sklearn.manifold import TSNE

    sets = [statistics.embeddings[variant].double() for variant in SETS]
    count = len(sets[0])
    tsne = TSNE(init='pca', perplexity=min(30, count - 1), random_state=0)
    places = tsne.fit_transform(torch.cat(sets).numpy()).reshape(len(sets), count, 2)
    figure = Figure(figsize=(10, 4), layout='constrained')
    panels = figure.subplots(1, len(sets), sharex=True, sharey=True)
    for axes, points, values, variant in zip(panels, places, sets, SETS, strict=True):
        axes.scatter(*places[0].T, s=8, color='0.8')
        colours = (
            dict(color='tab:blue') if statistics.labels is None else dict(c=np.ravel(statistics.labels), cmap='tab10')
        )
        axes.scatter(*points.T, s=10, **colours)
        found = (torch.cdist(values, sets[0]).argmin(1) == torch.arange(count)).double().mean()
        note = f'{100 * found:.0f} % nearest to themselves, clean'
        axes.set_title(f'{", ".join(variant)}\n{note if variant[1] == "corrupted" else "the reference"}', fontsize=9)
        axes.set(xticks=[], yticks=[])
    known = 'colours: classes' if statistics.labels is not None else 'coloured: the images of this panel'
    dots = [Line2D([], [], color=shade, marker='o', linestyle='') for shade in ('0.8', 'tab:blue')]
    figure.legend(dots, ['before, clean', known], loc='outside lower center', ncols=2, fontsize=8)
    figure.suptitle(f'{count} images, {severity}: last features of the backbone, t-SNE (no units)')
    return figure


def draw_features(views: ImageViews, number: int, severity: str) -> Figure:
    """Draws feature maps of one image in up to four stages of the backbone.

    A map is the projection of the features onto their first principal component. The component is computed from all
    shown clean images in the model before, so the four maps of a row share axis and scale.
    """
    view = views[number]
    stages = pick_evenly(list(view['before', 'clean'].stages), MOST_STAGES) if view['before', 'clean'].stages else []
    figure, grid = picture_grid([view['before', 'clean']] * (1 + len(stages)), len(VARIANTS))
    for axes, variant in zip(grid[0], VARIANTS, strict=True):
        show(axes, view[variant].image, ', '.join(variant))
    for row, name in zip(grid[1:], stages, strict=True):
        mean, axis = principal_axis([other['before', 'clean'].stages[name] for other in views])
        maps = [
            torch.einsum('chw,c->hw', view[variant].stages[name] - mean[:, None, None], axis) for variant in VARIANTS
        ]
        low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
        for axes, values in zip(row, maps, strict=True):
            drawn = show(axes, values.numpy(), vmin=low, vmax=high, cmap='viridis')
        row[0].set_ylabel(name, fontsize=8)
        figure.colorbar(drawn, ax=list(row)).ax.tick_params(labelsize=6)
    figure.suptitle(
        f'image {number + 1}, {severity}: features on the first principal component, in their own units', fontsize=9
    )
    return figure


def principal_axis(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the mean, (C,), and the first principal axis, (C,), of feature maps of shape (C, h, w)."""
    vectors = torch.cat([x.flatten(1) for x in maps], 1)
    return vectors.mean(1), torch.linalg.eigh(torch.cov(vectors))[1][:, -1]


def draw_attention(views: ImageViews, severity: str) -> Figure:
    """Draws the attention of the last attention layer over the images, in one color scale."""
    highest = max(float(view[variant].attention.max()) for view in views for variant in VARIANTS)
    figure, grid = picture_grid([view['before', 'clean'] for view in views], len(VARIANTS))
    for i, view in enumerate(views):
        for axes, variant in zip(grid[i], VARIANTS, strict=True):
            image = view[variant].image
            show(axes, image.mean(2), '' if i else ', '.join(variant), cmap='gray', vmin=0, vmax=255)
            height, width = image.shape[:2]
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            heat = show(axes, view[variant].attention.numpy(), cmap=HEAT, vmin=0, vmax=highest, extent=extent)
    bar = figure.colorbar(heat, ax=grid, aspect=40)
    bar.set_label('attention received (1: an even share)', fontsize=8)
    figure.suptitle(f'last attention of the backbone, {severity}', fontsize=9)
    return figure


def draw_predictions(views: ImageViews, severity: str) -> Figure:
    """Draws the predictions of both models on clean and corrupted images side by side."""
    figure, grid = picture_grid([view['before', 'clean'] for view in views], len(VARIANTS))
    for i, view in enumerate(views):
        for axes, variant in zip(grid[i], VARIANTS, strict=True):
            show(axes, view[variant].prediction, '' if i else ', '.join(variant))
    figure.suptitle(f'predictions, {severity}', fontsize=9)
    return figure


def picture_grid(rows: Sequence[ImageView], columns: int) -> tuple[Figure, Any]:
    """Returns a figure and its axes, one row for each image; the height of a row follows the aspect ratio."""
    heights = [view.image.shape[0] / view.image.shape[1] for view in rows]
    figure = Figure(figsize=(WIDTH * columns + 1, WIDTH * sum(heights) + 0.9), layout='constrained')
    return figure, figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)


def show(axes: Any, picture: np.ndarray, title: str = '', **options: Any) -> Any:
    """Draws one picture without ticks and returns it."""
    if title:
        axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])
    return axes.imshow(picture, **options)

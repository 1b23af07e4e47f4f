"""The tables and figures of what was measured: signal to noise, spectra, embeddings, features, attention."""

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
from .visualization import MOST_STAGES, VARIANTS, ImageView, LayerFigures, pick

Views = Sequence[Mapping[tuple[str, str], ImageView]]
LABELS = dict(before='before', after='after', restored='restored: after, against clean before')
COLOURS = dict(before='#d1242f', after='#0969da', restored='#2a9d3a')
SETS = {('before', 'clean'): '0.35', ('before', 'corrupted'): '#d1242f', ('after', 'corrupted'): '#2a9d3a'}
"""What the spectra and the embedding compare, with its colour."""
WIDTH = 1.9
"""Inches of a picture."""
HEAT = LinearSegmentedColormap.from_list('heat', [(1, 0.85, 0.2, 0), (1, 0.3, 0, 0.6), (0.85, 0, 0, 0.85)])
"""From transparent to red, to lie over an image."""


def table(curves: LayerFigures) -> str:
    """Returns the signal-to-noise ratio of every layer in decibels, first executed first."""
    rows = []
    for name, kind in curves.types.items():
        before, after, restored = (curves.ratios[key][name].decibels for key in LABELS)
        gains = (f'{value - before:+.2f}' for value in (after, restored))
        rows.append((name, kind, *(f'{value:.2f}' for value in (before, after, restored)), *gains))
    header = ('layer', 'type', 'SNR before (dB)', 'after', 'restored', 'after - before', 'restored - before')
    return f'{format_table(header, rows)}\none in {curves.every} of the vectors was taken'


def write_figures(folder: Path, curves: LayerFigures, views: Views, severity: str) -> list[str]:
    """Writes all figures as PNG and returns their names.

    Args:
        folder: Where to.
        curves: What was measured.
        views: Of a few images.
        severity: What was done to them, for the titles.
    """
    figures = {
        'signal_to_noise': draw_ratios(curves, severity),
        'spectra': draw_spectra(curves, severity),
        'embedding': draw_embedding(curves, severity),
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


def draw_ratios(curves: LayerFigures, severity: str) -> Figure:
    """Draws the signal-to-noise ratio over the layers."""
    names = list(curves.types)
    figure = Figure(figsize=(max(6, 0.22 * len(names)), 4.5), layout='constrained')
    axes = figure.subplots()
    for key, style in zip(LABELS, ('o-', 's-', '^--'), strict=True):
        values = [curves.ratios[key][name].decibels for name in names]
        axes.plot(values, style, color=COLOURS[key], label=LABELS[key], markersize=4, linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set(title=f'signal-to-noise ratio of the layers, {severity}', ylabel='SNR (dB)')
    axes.grid(axis='y', alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_spectra(figures: LayerFigures, severity: str) -> Figure:
    """Draws the variances along the principal axes of some layers' outputs."""
    layers = {
        name: {
            ', '.join(variant): (torch.linalg.eigvalsh(figures.moments[variant][name].covariance).flatten(), colour)
            for variant, colour in SETS.items()
        }
        for name in figures.moments['before', 'clean']
    }
    figure = _spectra_grid(layers, 'variance (squared units of the feature)')
    figure.suptitle(f'spectra of the layers, {severity}')
    return figure


def _spectra_grid(layers: Mapping[str, Mapping[str, tuple[Tensor, Any]]], ylabel: str) -> Figure:
    """Draws variances in descending order, a panel for each layer.

    Args:
        layers: Layer, label: variances, and a colour.
        ylabel: What the variances are.
    """
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(4.5, 3 * columns), 2.4 * rows + 0.7), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, curves) in zip(grid.flat, layers.items(), strict=False):
        for (label, (values, colour)), style in zip(curves.items(), ('-', '--', ':'), strict=False):
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
    """Draws the variances along the principal axes of up to nine layers, before and after a calibration.

    Args:
        report: What was done.
        source: Moments in the training domain, drawn beside them.
    """
    chosen = {layer.name: layer for layer in report.layers}
    layers: dict[str, dict[str, tuple[Tensor, Any]]] = {}
    for name in pick(list(chosen), 9):
        layers[name] = {'these images': (chosen[name].before, None), 'corrected': (chosen[name].after, None)}
        if source:
            layers[name]['training domain'] = (torch.linalg.eigvalsh(source[name].covariance).flatten(), None)
    return _spectra_grid(layers, 'variance')


def draw_embedding(curves: LayerFigures, severity: str) -> Figure:
    """Draws the embeddings of the same images clean, corrupted, and corrupted for the model after, by t-SNE.

    The titles say for how many corrupted images the nearest clean one, in all dimensions, is the same image.
    """
    from sklearn.manifold import TSNE

    sets = [curves.embeddings[variant].double() for variant in SETS]
    count = len(sets[0])
    tsne = TSNE(init='pca', perplexity=min(30, count - 1), random_state=0)
    places = tsne.fit_transform(torch.cat(sets).numpy()).reshape(len(sets), count, 2)
    figure = Figure(figsize=(10, 4), layout='constrained')
    panels = figure.subplots(1, len(sets), sharex=True, sharey=True)
    for axes, points, values, variant in zip(panels, places, sets, SETS, strict=True):
        axes.scatter(*places[0].T, s=8, color='0.8')
        colours = dict(color='tab:blue') if curves.labels is None else dict(c=np.ravel(curves.labels), cmap='tab10')
        axes.scatter(*points.T, s=10, **colours)
        found = (torch.cdist(values, sets[0]).argmin(1) == torch.arange(count)).double().mean()
        note = f'{100 * found:.0f} % nearest to themselves, clean'
        axes.set_title(f'{", ".join(variant)}\n{note if variant[1] == "corrupted" else "the reference"}', fontsize=9)
        axes.set(xticks=[], yticks=[])
    known = 'colours: classes' if curves.labels is not None else 'coloured: the images of this panel'
    dots = [Line2D([], [], color=shade, marker='o', linestyle='') for shade in ('0.8', 'tab:blue')]
    figure.legend(dots, ['before, clean', known], loc='outside lower center', ncols=2, fontsize=8)
    figure.suptitle(f'{count} images, {severity}: last features of the backbone, t-SNE (no units)')
    return figure


def draw_features(views: Views, number: int, severity: str) -> Figure:
    """Draws the features of one image in up to four parts of the backbone.

    A map is the projection on the first principal component of the features of all shown images, clean, before; so the
    four maps of a row have the same axis and the same scale.
    """
    view = views[number]
    stages = pick(list(view['before', 'clean'].stages), MOST_STAGES) if view['before', 'clean'].stages else []
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
    """Returns the mean, (C,), and the first principal axis, (C,), of features, (C, h, w) each."""
    vectors = torch.cat([x.flatten(1) for x in maps], 1)
    return vectors.mean(1), torch.linalg.eigh(torch.cov(vectors))[1][:, -1]


def draw_attention(views: Views, severity: str) -> Figure:
    """Draws the last attention over the images, in one scale for all."""
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


def draw_predictions(views: Views, severity: str) -> Figure:
    """Draws what the whole model predicts, side by side."""
    figure, grid = picture_grid([view['before', 'clean'] for view in views], len(VARIANTS))
    for i, view in enumerate(views):
        for axes, variant in zip(grid[i], VARIANTS, strict=True):
            show(axes, view[variant].prediction, '' if i else ', '.join(variant))
    figure.suptitle(f'predictions, {severity}', fontsize=9)
    return figure


def picture_grid(rows: Sequence[ImageView], columns: int) -> tuple[Figure, Any]:
    """Returns a figure with as many rows as images, as high as they are, and its axes."""
    heights = [view.image.shape[0] / view.image.shape[1] for view in rows]
    figure = Figure(figsize=(WIDTH * columns + 1, WIDTH * sum(heights) + 0.9), layout='constrained')
    return figure, figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)


def show(axes: Any, picture: np.ndarray, title: str = '', **options: Any) -> Any:
    """Draws one picture without ticks."""
    if title:
        axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])
    return axes.imshow(picture, **options)

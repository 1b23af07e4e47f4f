"""Draws queries and their nearest gallery images from a file of ``ReIDMetric(matches_file=...)``."""

import json
import random
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config

from ..core import InputError
from .arguments import at_least
from .errors import config_at_fault, config_path
from .images import open_images
from .pixels import to_rgb

GREY, GREEN, RED = '0.45', '#2a9d3a', '#d1242f'
WIDTH = 1.0
"""Width of an image in inches."""


def draw_matches(
    cfg: Config, path: str | Path, queries: int = 8, *, seed: int = 0, hardest: bool = False
) -> tuple[Figure, int]:
    """Draws each query in a row with its nearest gallery images, nearest first.

    The query has a grey frame, gallery images of the same identity a green one, and others a red one. The labels give
    the average precision of a query, the squared distance of a gallery image, and identity and camera.

    Args:
        cfg: Config of the evaluation; its test data set has the images.
        path: File of ``ReIDMetric(matches_file=...)``.
        queries: Number of queries to draw.
        seed: Seed of the random choice of queries.
        hardest: Whether to draw the queries with the lowest average precision instead.

    Returns:
        The figure; the number of queries in the file.

    Raises:
        InputError: The file was not written by ReIDMetric, or belongs to another data set.

    Examples:
        >>> options = ['test_evaluator.matches_file=matches.json', 'log_level=ERROR']
        >>> cfg = load_config('configs/demo/vit_fashion-reid.py', options, launcher='none')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> test(cfg, 'vit.pth')
        Loads checkpoint by local backend from path: vit.pth
        >>> figure, count = draw_matches(cfg, 'matches.json', queries=2)
        >>> figure.savefig('matches.png')
    """
    at_least(1, queries=queries)
    entries = read_matches(Path(path))
    count = min(queries, len(entries))
    if hardest:
        chosen = sorted(entries, key=lambda entry: entry['ap'])[:count]
    else:
        chosen = [entries[i] for i in sorted(random.Random(seed).sample(range(len(entries)), count))]
    wanted = [image for entry in chosen for image in (entry, *entry['matches'])]
    return _draw(chosen, _read_images(cfg, wanted, Path(path))), len(entries)


def read_matches(path: Path) -> list[dict[str, Any]]:
    """Returns the queries in a file of ``ReIDMetric(matches_file=...)``.

    Raises:
        InputError: The file can't be read, or was not written by ReIDMetric.
    """
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f'{path} cannot be read: {error.strerror}') from None
    except ValueError as error:
        raise InputError(f'{path} is not JSON ({error}); write it with ReIDMetric(matches_file=...)') from None
    try:
        for entry in entries:
            float(entry['ap'])
            for match in entry['matches']:
                float(match['distance']), bool(match['correct'])
            for image in (entry, *entry['matches']):
                int(image['sample_idx']), hash(image['img_path']), image['pid'], image['camid']
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path} is no file of ReIDMetric(matches_file=...): {type(error).__name__} {error}') from None
    if not entries:
        raise InputError(f'{path} has no queries')
    return entries


def _read_images(cfg: Config, wanted: list[dict[str, Any]], path: Path) -> dict[int, Any]:
    """Returns the loaded images of the test data set by ``sample_idx``, (H, W, C) or (H, W).

    Args:
        cfg: The config.
        wanted: Entries of the file with ``sample_idx`` and ``img_path``.
        path: The file, for messages.
    """
    with config_at_fault(config_path(cfg)):
        dataset = open_images(cfg, 'test')
    numbers: dict[int, dict[str, int]] = {}
    for number in range(len(dataset)):
        info = dataset.info(number)
        numbers.setdefault(info.get('sample_idx', number), {})[info.get('img_path', '')] = number
    images = {}
    for entry in wanted:
        index, name = entry['sample_idx'], entry['img_path']
        found = numbers.get(index, {'nothing': -1})
        if name not in found:
            raise InputError(
                f'{path} is of another data set: its image {index} is {name}, in the test data set it is {min(found)}'
            )
        if len(found) > 1:
            raise InputError(f'{dataset.what} has {len(found)} images of number {index}: {", ".join(sorted(found))}')
        if index not in images:
            images[index] = dataset.load(found[name])
    return images


def _draw(entries: list[dict[str, Any]], images: dict[int, Any]) -> Figure:
    """Returns the figure with one row for each query."""
    columns = 1 + max(len(entry['matches']) for entry in entries)
    ratio = max(images[entry['sample_idx']].shape[0] / images[entry['sample_idx']].shape[1] for entry in entries)
    size = (columns * WIDTH * 1.15, len(entries) * (WIDTH * ratio + 0.45))
    figure = Figure(figsize=size)
    grid = figure.subplots(len(entries), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.1 / size[0], right=1 - 0.1 / size[0], bottom=0.4 / size[1], top=1 - 0.1 / size[1], hspace=0.4 / ratio
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, entry in zip(grid, entries, strict=True):
        _show(row[0], entry, images, GREY, f'AP {entry["ap"]:.2f}')
        for axes, match in zip(row[1:], entry['matches'], strict=False):
            _show(axes, match, images, GREEN if match['correct'] else RED, f'{match["distance"]:.3f}')
    return figure


def _show(axes: Any, entry: dict[str, Any], images: dict[int, Any], colour: str, figure: str) -> None:
    """Draws an image in a frame; the label below it has a figure, the identity and the camera."""
    axes.set_axis_on()
    axes.imshow(to_rgb(images[entry['sample_idx']]))
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f'{figure}\nid {entry["pid"]}, cam {entry["camid"]}', fontsize=7, labelpad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3)

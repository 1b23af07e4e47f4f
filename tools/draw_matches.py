"""Draws queries beside their nearest gallery images, from the file that ReIDMetric(matches_file=...) writes.

A row is a query, in a grey frame, and what was found for it, nearest first: in a green frame where it shows the same
identity, in a red one where it does not. Below an image stand its squared distance, identity and camera.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from launch import launch, stop

GREY, GREEN, RED = '0.45', '#2a9d3a', '#d1242f'
WIDTH = 1.0
"""Inches of an image."""


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the evaluation: its test data set has the images')
    parser.add_argument('matches', type=Path, help='what ReIDMetric wrote')
    parser.add_argument('output', type=Path, help='picture to write, OUT.png')
    parser.add_argument('--queries', type=int, default=8, help='number of queries (default: %(default)s)')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--seed', type=int, default=0, help='of the random choice of queries (default: %(default)s)')
    which.add_argument('--hardest', action='store_true', help='take those with the lowest average precision')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    args = parser.parse_args()
    if args.queries < 1:
        parser.error('--queries must be 1 or more')
    return args


def read_matches(path: Path) -> list[dict[str, Any]]:
    """Returns the queries of a file of ReIDMetric; ends the program if it is none."""
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        stop(f'{path} cannot be read: {error.strerror}')
    except ValueError as error:
        stop(f'{path} is not JSON ({error}); write it with ReIDMetric(matches_file=...)')
    try:
        for entry in entries:
            float(entry['ap'])
            for match in entry['matches']:
                float(match['distance']), bool(match['correct'])
            for image in (entry, *entry['matches']):
                int(image['sample_idx']), image['img_path'], image['pid'], image['camid']
    except (KeyError, TypeError, ValueError) as error:
        stop(f'{path} is no file of ReIDMetric(matches_file=...): {type(error).__name__} {error}')
    if not entries:
        stop(f'{path} has no queries')
    return entries


def main() -> None:
    """Chooses queries, reads their images and writes the picture."""
    args = parse_args()
    from common import load_config
    from outputs import check_output, written_whole

    check_output(args.output, '.png', args.overwrite)
    entries = read_matches(args.matches)
    count = min(args.queries, len(entries))
    if args.hardest:
        chosen = sorted(entries, key=lambda entry: entry['ap'])[:count]
    else:
        chosen = [entries[i] for i in sorted(random.Random(args.seed).sample(range(len(entries)), count))]
    cfg = load_config(args)
    wanted = [image for entry in chosen for image in (entry, *entry['matches'])]
    images = read_images(cfg, wanted, args.matches)
    figure = draw(chosen, images)
    with written_whole(args.output) as file:
        figure.savefig(file, format='png', dpi=100)
    print(f'{args.output}: {count} of {len(entries):,} queries')


def read_images(cfg: Any, wanted: list[dict[str, Any]], path: Path) -> dict[int, Any]:
    """Returns images by ``sample_idx``, (H, W, C) or (H, W), as the test data set of the config loads them.

    Args:
        cfg: The config.
        wanted: Entries with ``sample_idx`` and ``img_path``.
        path: The file that they come from.
    """
    from common import config_at_fault
    from mmdenoiserep.apis.images import open_images

    with config_at_fault(cfg.filename):
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
            stop(f'{path} is of another data set: its image {index} is {name}, in the test data set it is {min(found)}')
        if len(found) > 1:
            stop(
                f'the test data set of the config has {len(found)} images of number {index}: {", ".join(sorted(found))}'
            )
        if index not in images:
            images[index] = dataset.load(found[name])
    return images


def draw(entries: list[dict[str, Any]], images: dict[int, Any]) -> Any:
    """Returns the figure: a row for each query, as wide as its matches."""
    from matplotlib.figure import Figure

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
        show(row[0], entry, images, GREY, f'AP {entry["ap"]:.2f}')
        for axes, match in zip(row[1:], entry['matches'], strict=False):
            show(axes, match, images, GREEN if match['correct'] else RED, f'{match["distance"]:.3f}')
    return figure


def show(axes: Any, entry: dict[str, Any], images: dict[int, Any], colour: str, figure: str) -> None:
    """Draws an image in a frame, with a figure, its identity and its camera below."""
    from mmdenoiserep.apis.pixels import to_rgb

    axes.set_axis_on()
    axes.imshow(to_rgb(images[entry['sample_idx']]))
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f'{figure}\nid {entry["pid"]}, cam {entry["camid"]}', fontsize=7, labelpad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3)


if __name__ == '__main__':
    launch(main)

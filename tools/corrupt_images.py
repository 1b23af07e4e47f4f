"""Copies a folder of images with one corruption: noise, blur and the like, drawn from a seed.

Image i of the sorted paths depends on the seed and on i alone. Names, formats, channels, bits, alpha and the EXIF of a
JPEG file stay, so that annotations still fit; a JPEG file is written at its best quality. What can't stay is refused:
palettes, CMYK, floats, several pages. Values of 16 bits count as shares of 65,535.
"""

import argparse
from pathlib import Path

from launch import launch, stop

SEVERITIES = dict(noise=40 / 255, blur=2.0, jpeg=10, contrast=0.5, occlusion=0.4, shot=0.05)
"""Corruption: what is taken unless something else is asked for."""


def files_in(path: Path) -> list[Path]:
    """Returns the files in a folder, or of a path that is a file, itself."""
    return [file for file in path.rglob('*') if not file.is_dir()] if path.is_dir() else [path]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, help='folder of images; folders in it are searched too')
    parser.add_argument('output', metavar='OUT', type=Path, help='folder to write, with the same folders in it')
    parser.add_argument('corruption', choices=SEVERITIES, help='what is done to them')
    parser.add_argument(
        '--severity',
        type=float,
        help='noise: standard deviation, 0 to 1; blur: standard deviation in pixels; jpeg: quality, 1 to 100; '
        'contrast: factor; occlusion: side of a black rectangle, 0 to 1; shot: scale, 0 to 1 '
        f'(default: {", ".join(f"{name} {value:.2g}" for name, value in SEVERITIES.items())})',
    )
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    args = parser.parse_args()
    if args.seed < 0:
        parser.error('--seed must be 0 or more')
    return args


def main() -> None:
    """Copies the images."""
    args = parse_args()
    from tqdm import tqdm

    from mmdenoiserep.apis.corruptions import corrupt, make_transform
    from mmdenoiserep.apis.folders import find_images
    from mmdenoiserep.apis.pixels import read_stored
    from mmdenoiserep.core import InputError
    from outputs import check_folder, folder_written_whole

    if args.output.resolve() in (args.images.resolve(), *args.images.resolve().parents):
        stop(f'{args.output} holds the images themselves; name another folder')
    if args.images.resolve() in args.output.resolve().parents:
        stop(f'{args.output} lies among the images, so the next run would take it for some; name a folder beside them')
    paths = find_images(args.images)
    copies = {args.output / path.relative_to(args.images) for path in paths}
    check_folder(args.output, lambda path: copies.issuperset(files_in(path)), args.overwrite)
    severity = SEVERITIES[args.corruption] if args.severity is None else args.severity
    make_transform(args.corruption, severity, args.seed)
    with folder_written_whole(args.output) as new:
        for i, path in enumerate(tqdm(paths, unit='image')):
            stored = read_stored(path)
            try:
                pixels = corrupt(stored.pixels, args.corruption, severity, args.seed, i)
            except InputError as error:
                raise InputError(f'{path}: {error}') from None
            target = new / path.relative_to(args.images)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stored.encode(pixels))
    print(f'{args.output}: {len(paths):,} images, {args.corruption} {severity:g}')


if __name__ == '__main__':
    launch(main)

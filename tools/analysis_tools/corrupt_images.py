"""Writes a corrupted copy of a folder of images: noise, blur, JPEG artefacts and more.

Image i of the sorted paths depends on the seed and on i alone. The copies keep name, format, channels, bit depth, alpha
and the EXIF of JPEG files, so annotations still fit; JPEG files are written at the best quality. Images that can't be
kept so are refused: palettes, CMYK, floats, several pages.
"""

import argparse
from pathlib import Path

from denoiserep_commands import launch

CORRUPTIONS = ('noise', 'blur', 'jpeg', 'contrast', 'occlusion', 'shot', 'colour', 'haze', 'mixture', 'varying')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, help='folder of images; its subfolders are searched too')
    parser.add_argument('output', metavar='OUT', type=Path, help='folder to write, with the same subfolders')
    parser.add_argument('corruption', choices=CORRUPTIONS, help='corruption of the images')
    parser.add_argument(
        '--severity',
        type=float,
        help='noise: standard deviation, for values from 0 to 1; blur: standard deviation in pixels; jpeg: quality, '
        '1 to 100; contrast: factor; occlusion: side of a black rectangle over that of the image; shot: scale, 0 to 1; '
        'colour: gain of red, less 1, 0 to 1; haze: share of white, 0 to 1; mixture: factor of the '
        'default blur and noise; varying: largest standard deviation of a noise that differs by image (default: noise '
        '0.16, blur 2, jpeg 10, contrast 0.5, occlusion 0.4, shot 0.05, colour 0.5, haze 0.3, mixture 1, varying 0.31)',
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the corruption (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    args = parser.parse_args()
    if args.seed < 0:
        parser.error('--seed must be 0 or more')
    return args


def main() -> None:
    """Writes the corrupted copy."""
    args = parse_args()
    from mmdenoiserep.apis.corruptions import SEVERITIES, corrupt_folder

    severity = SEVERITIES[args.corruption] if args.severity is None else args.severity
    count = corrupt_folder(args.images, args.output, args.corruption, severity, args.seed, args.overwrite)
    print(f'{args.output}: {count:,} images, {args.corruption} {severity:g}')


if __name__ == '__main__':
    launch(main)

"""Copies a folder of images with one corruption: noise, blur and the like, drawn from a seed.

Image i of the sorted paths depends on the seed and on i alone. Names stay, so that annotations still fit; a JPEG file
is written at its best quality.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launch import launch, stop

if TYPE_CHECKING:
    from torch import Tensor

SEVERITIES = dict(noise=40 / 255, blur=2.0, jpeg=10, contrast=0.5, occlusion=0.4, shot=0.05)
"""Corruption: what is taken unless something else is asked for."""


def corrupt(images: 'Tensor', corruption: str, severity: float, seed: int) -> 'Tensor':
    """Returns corrupted images; image i depends on the seed and on i alone.

    Args:
        images: (N, C, H, W), uint8; three channels are BGR, as the libraries load them.
        corruption: ``clean``; Gaussian ``noise`` or ``blur``, the severity its standard deviation (noise: of 1, blur:
            in pixels); ``jpeg``, its quality; ``contrast``, the factor of all values; ``occlusion`` by one black
            rectangle, its side as a share of the image's; ``shot`` noise, its scale.
        severity: See there.
        seed: Of everything that is drawn.
    """
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # it asks the network for news otherwise
    import albumentations as A
    import torch

    if corruption == 'clean':
        return images
    both = (severity, severity)
    kind, options = {
        'noise': (A.GaussNoise, dict(std_range=both)),
        'blur': (A.GaussianBlur, dict(sigma_limit=both, blur_limit=0)),
        'jpeg': (A.ImageCompression, dict(quality_range=both)),
        'contrast': (A.RandomBrightnessContrast, dict(brightness_limit=(0, 0), contrast_limit=(severity - 1,) * 2)),
        'occlusion': (
            A.CoarseDropout,
            dict(num_holes_range=(1, 1), hole_height_range=both, hole_width_range=both, fill=0),
        ),
        'shot': (A.ShotNoise, dict(scale_range=both)),
    }[corruption]
    transform = A.Compose([kind(**options, p=1.0)], seed=seed)  # draws in the order of the images
    rgb = images.flip(1).permute(0, 2, 3, 1).contiguous().numpy()
    corrupted = torch.stack([torch.from_numpy(transform(image=image)['image']) for image in rgb])
    return corrupted.permute(0, 3, 1, 2).flip(1).contiguous()


def check_corruption(corruption: str, severity: float) -> None:
    """Ends the program if a corruption does not take a severity."""
    import torch

    try:
        corrupt(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), corruption, severity, seed=0)
    except ValueError as error:  # albumentations checks its arguments
        stop(f'--severity {severity:g} does not work for {corruption}: {" ".join(str(error).split())}')


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
    return parser.parse_args()


def main() -> None:
    """Copies the images."""
    args = parse_args()
    import cv2
    import torch
    from tqdm import tqdm

    from mmdenoiserep.apis.folders import find_images
    from outputs import check_folder, folder_written_whole

    if args.output.resolve() in (args.images.resolve(), *args.images.resolve().parents):
        stop(f'{args.output} holds the images themselves; name another folder')
    paths = find_images(args.images)
    copies = {args.output / path.relative_to(args.images) for path in paths}
    check_folder(args.output, lambda path: copies.issuperset(files_in(path)), args.overwrite)
    severity = SEVERITIES[args.corruption] if args.severity is None else args.severity
    check_corruption(args.corruption, severity)
    full_colour = cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    best = [cv2.IMWRITE_JPEG_QUALITY, 100, *full_colour]
    with folder_written_whole(args.output) as new:
        for i, path in enumerate(tqdm(paths, unit='image')):
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None:
                stop(f'{path} cannot be read; remove it, or mend it')
            batch = torch.from_numpy(image).permute(2, 0, 1)[None]
            spoiled = corrupt(batch, args.corruption, severity, args.seed + i)
            target = new / path.relative_to(args.images)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(cv2.imencode(target.suffix, spoiled[0].permute(1, 2, 0).numpy(), best)[1].tobytes())
    print(f'{args.output}: {len(paths):,} images, {args.corruption} {severity:g}')


if __name__ == '__main__':
    launch(main)

"""Extracts the features of all images in a folder with a re-identification model, before normalisation.

The file has ``features``, (N, C), float32, and the sorted ``paths``, (N,), relative to the folder, with ``/``.
"""

import argparse
from pathlib import Path

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config with a re-identification head and a test pipeline')
    parser.add_argument(
        'checkpoint', help='checkpoint for the config: denoised, or fused for a config without denoising'
    )
    parser.add_argument('images', type=Path, help='folder of images; its subfolders are searched too')
    parser.add_argument('output', type=Path, help='file to write, OUT.npz')
    parser.add_argument('--batch-size', type=int, default=64, help='batch size (default: %(default)s)')
    parser.add_argument('--device', help='device to compute on, such as cpu or cuda:1 (default: GPU if there is one)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error('--batch-size must be 1 or more')
    return args


def main() -> None:
    """Extracts the features and writes them."""
    args = parse_args()
    import numpy as np

    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.features import extract_features
    from mmdenoiserep.core.files.atomic import check_output, write_file

    check_output(args.output, args.overwrite, suffix='.npz')
    cfg = load_config(args.config, args.cfg_options)
    features, paths = extract_features(
        cfg, args.checkpoint, args.images, batch_size=args.batch_size, device=args.device
    )
    with write_file(args.output) as file:
        np.savez(file, features=features, paths=np.array(paths))
    print(f'{args.output}: {len(paths):,} images, {features.shape[1]} channels')


if __name__ == '__main__':
    launch(main)

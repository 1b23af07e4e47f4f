"""Folds the denoisers of a checkpoint into its weights, for the config without denoising."""

import argparse

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('input', help='checkpoint of a training with DenoiseRep')
    parser.add_argument('output', help='file to write')
    parser.add_argument(
        '--verify',
        metavar='CONFIG',
        help='config of the training: compare the outputs of the denoised and the fused backbone on random images, and '
        'write nothing if they differ',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument(
        '--allow-pickle',
        action='store_true',
        help='read any pickle, which can run arbitrary code; only for files you trust',
    )
    return parser.parse_args()


def main() -> None:
    """Fuses one file."""
    args = parse_args()
    if args.verify:
        from mmdenoiserep.apis.config import load_config
        from mmdenoiserep.apis.fusion import fuse_file

        how = dict(overwrite=args.overwrite, allow_pickle=args.allow_pickle)
        result, differences = fuse_file(args.input, args.output, cfg=load_config(args.verify), **how)
    else:  # needs torch alone
        from mmdenoiserep.core import fuse_checkpoint

        result = fuse_checkpoint(args.input, args.output, overwrite=args.overwrite, allow_pickle=args.allow_pickle)
        differences = {}
    for name, difference in differences.items():
        print(f'{name} on two random images, unfused against fused:\n{difference}')
    print(result)
    print(f'{args.output} loads into the config without denoising, also without this package')


if __name__ == '__main__':
    launch(main)

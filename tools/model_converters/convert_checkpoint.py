"""Converts a released checkpoint to the parameter names of mmpretrain.

transreid: a ViT of TransReID-SSL or TransReID, pretrained or trained for re-identification
vmamba:    an ImageNet classifier of VMamba
plain:     weights that keep their names, from a safetensors file or from one of several state dicts (--key)
"""

import argparse
from pathlib import Path

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('format', choices=['transreid', 'vmamba', 'plain'], help='format of the input')
    parser.add_argument('input', type=Path, help='released file, such as vit_small_cfs_lup.pth')
    parser.add_argument('output', type=Path, help='file to write')
    parser.add_argument(
        '--key',
        help='plain: key of the weights, such as teacher or state_dict_ema; dots separate the keys of nested dicts',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument(
        '--allow-pickle',
        action='store_true',
        help='read any pickle, which can run arbitrary code; only for files you trust',
    )
    args = parser.parse_args()
    if args.key and args.format != 'plain':
        parser.error(f'{args.format} does not take --key')
    return args


def main() -> None:
    """Converts one file."""
    args = parse_args()
    from mmdenoiserep.apis.conversion import convert_file

    how = dict(key=args.key, overwrite=args.overwrite, allow_pickle=args.allow_pickle)
    count, notes = convert_file(args.format, args.input, args.output, **how)
    for note in notes:
        print(f'note: {note}')
    print(f'{args.output}: {count} tensors')


if __name__ == '__main__':
    launch(main)

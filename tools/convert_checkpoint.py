"""Converts a checkpoint that others released, for the configs of this project and for all of its tools.

transreid: a ViT of TransReID-SSL or TransReID, pretrained or trained for re-identification, to the names of mmpretrain.
vmamba:    a VMamba trained on ImageNet, with its classifier, to the names of mmpretrain.
plain:     weights that keep their names: a safetensors file, or of several dicts of weights the one that --key names.
"""

import argparse
from pathlib import Path

from launch import launch, stop


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('format', choices=['transreid', 'vmamba', 'plain'], help='whose names the input has')
    parser.add_argument('input', type=Path, help='released file, such as vit_small_cfs_lup.pth')
    parser.add_argument('output', type=Path, help='file to write')
    parser.add_argument(
        '--key',
        help='plain: where the weights lie in the input, such as teacher or state_dict_ema; a dot leads into a dict',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument(
        '--allow-pickle',
        action='store_true',
        help='read any pickle, which runs code that the input brings; only for files you trust',
    )
    args = parser.parse_args()
    if args.key and args.format != 'plain':
        parser.error(f'{args.format} does not take --key')
    return args


def main() -> None:
    """Converts one file."""
    args = parse_args()
    from mmdenoiserep.core import read_checkpoint
    from mmdenoiserep.core.files.checkpoint import check_target, split_checkpoint, write_atomically

    check_target(args.input, args.output, args.overwrite)
    released = read_checkpoint(args.input, args.allow_pickle)
    meta: dict = {}
    if args.format == 'plain':
        notes: list[str] = []
        state, meta = split_checkpoint(released, args.input, notes, args.key)
        for note in notes:
            print(f'note: {note}')
    else:
        if args.format == 'vmamba':
            from mmdenoiserep.models.vmamba import convert_vmamba as convert
        else:
            from mmdenoiserep.models.transreid import convert_transreid as convert
        try:
            state = convert(released)
        except ValueError as error:
            stop(f'{args.input} cannot be converted: {error}')
    write_atomically(dict(meta=meta, state_dict=state), args.output)
    print(f'{args.output}: {len(state)} tensors')


if __name__ == '__main__':
    launch(main)

"""Converts a released ViT of TransReID-SSL or TransReID to the names of mmpretrain, for the configs in configs/reid."""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('input', type=Path, help='released file, such as vit_small_cfs_lup.pth')
    parser.add_argument('output', type=Path, help='file to write, such as pretrained/vit_small_cfs_lup.pth')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument(
        '--allow-pickle',
        action='store_true',
        help='read any pickle, which runs code that the input brings; only for files you trust',
    )
    return parser.parse_args()


def main() -> None:
    """Converts one file."""
    args = parse_args()
    from mmdenoiserep.core import CheckpointError, read_checkpoint
    from mmdenoiserep.core.checkpoint import check_target, write_atomically
    from mmdenoiserep.tasks.reid.transreid import convert_transreid

    try:
        check_target(args.input, args.output, args.overwrite)
        state = convert_transreid(read_checkpoint(args.input, args.allow_pickle))
        write_atomically(dict(meta={}, state_dict=state), args.output)
    except CheckpointError as error:
        sys.exit(f'convert_transreid: {error}')
    except ValueError as error:
        sys.exit(f'convert_transreid: {args.input} cannot be converted: {error}')
    tokens = state['backbone.pos_embed'].shape[1] - 1
    print(f'{args.output}: {len(state)} tensors, {tokens} position encodings')


if __name__ == '__main__':
    main()

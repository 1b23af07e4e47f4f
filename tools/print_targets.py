"""Prints which layers of a config's backbones get a denoiser, and which can't, without training or loading anything."""

import argparse

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config with DenoiseRepBackbone, or one of your own without it')
    parser.add_argument(
        '--targets',
        nargs='+',
        metavar='TARGET',
        help='try these instead: mlp, linear, conv2d, all, or regular expressions that match a whole name',
    )
    parser.add_argument('--exclude', nargs='+', metavar='REGEX', help='names to leave out')
    parser.add_argument('--rank', type=int, help='rank of the denoisers, 0 for full (default: that of the config)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    return parser.parse_args()


def main() -> None:
    """Builds the backbones and prints the table of each conversion."""
    args = parse_args()
    from mmdenoiserep.apis.backbones import convert_backbones
    from mmdenoiserep.apis.config import load_config

    options = {key: value for key, value in dict(targets=args.targets, exclude=args.exclude).items() if value}
    if args.rank is not None:
        options['rank'] = args.rank or None
    cfg = load_config(args.config, args.cfg_options)
    for name, report in convert_backbones(cfg, options).items():
        print(f'{name}\n{report}')


if __name__ == '__main__':
    launch(main)

"""Prints which layers of a config's backbones get a denoiser and why others are skipped; loads no weights."""

import argparse

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config with DenoiseRepBackbone; without it, all its backbones are converted')
    parser.add_argument(
        '--targets',
        nargs='+',
        metavar='TARGET',
        help='override the targets: mlp, linear, conv2d, all, or regular expressions that match whole layer names',
    )
    parser.add_argument('--exclude', nargs='+', metavar='REGEX', help='layer names to exclude')
    parser.add_argument('--rank', type=int, help='override the rank of the denoisers, 0 for full')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    return parser.parse_args()


def main() -> None:
    """Converts the backbones and prints the report of each conversion."""
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

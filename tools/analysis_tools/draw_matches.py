"""Draws queries and their nearest gallery images, from a file of ReIDMetric(matches_file=...).

Each row shows a query in a grey frame and its gallery images, nearest first: the same identity in a green frame, others
in a red one. The labels give average precision or squared distance, identity and camera.
"""

import argparse
from pathlib import Path

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the evaluation; its test data set has the images')
    parser.add_argument('matches', type=Path, help='matches_file of ReIDMetric')
    parser.add_argument('output', type=Path, help='picture to write, OUT.png')
    parser.add_argument('--queries', type=int, default=8, help='number of queries to draw (default: %(default)s)')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--seed', type=int, default=0, help='seed of the choice of queries (default: %(default)s)')
    which.add_argument('--hardest', action='store_true', help='draw the queries with the lowest average precision')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    args = parser.parse_args()
    if args.queries < 1:
        parser.error('--queries must be 1 or more')
    return args


def main() -> None:
    """Draws and writes the picture."""
    args = parse_args()
    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.matches import draw_matches, read_matches
    from mmdenoiserep.core.files.atomic import check_output, write_file

    check_output(args.output, args.overwrite, suffix='.png')
    read_matches(args.matches)
    cfg = load_config(args.config, args.cfg_options)
    figure, count = draw_matches(cfg, args.matches, args.queries, seed=args.seed, hardest=args.hardest)
    with write_file(args.output) as file:
        figure.savefig(file, format='png', dpi=100)
    print(f'{args.output}: {min(args.queries, count)} of {count:,} queries')


if __name__ == '__main__':
    launch(main)

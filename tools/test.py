"""Evaluates a checkpoint with a config of mmdet, mmseg or mmpretrain; fused ones with the config without denoising."""

import argparse
import os

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line; the options are the same as in mmdet's ``tools/test.py``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for logs (default: work_dirs/<name of the config>)')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this pickle file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='FOLDER', help='subfolder of the work dir for drawn predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between two windows (default: 2)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override settings of the config, such as test_dataloader.batch_size=4 or key="[a,b]"',
    )
    parser.add_argument('--tta', action='store_true', help='use the test-time augmentation of the config')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='launcher of the processes'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error('--out must end with .pkl or .pickle')
    return args


def main() -> None:
    """Builds the runner and evaluates."""
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from mmdenoiserep.apis import config, run

    cfg = config.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if args.show or args.show_dir:
        config.enable_visualization_hook(cfg, args.show_dir, args.show, args.wait_time)
    if args.tta:
        config.use_tta(cfg)
    run.test(cfg, args.checkpoint, args.out)


if __name__ == '__main__':
    launch(main)

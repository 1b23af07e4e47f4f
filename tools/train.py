"""Trains a config of mmdet, mmseg or mmpretrain, with or without DenoiseRep."""

import argparse
import os

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line; the options are the same as in mmdet's ``tools/train.py``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the last one in the work dir',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override settings of the config, such as train_dataloader.batch_size=4 or key="[a,b]"',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='launcher of the processes'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return parser.parse_args()


def main() -> None:
    """Builds the runner and trains."""
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from mmdenoiserep.apis import config, run

    cfg = config.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if args.amp:
        config.use_amp(cfg)
    if args.auto_scale_lr:
        config.enable_auto_scale_lr(cfg)
    if args.resume:
        run.resume(cfg, args.resume)
    run.train(cfg)


if __name__ == '__main__':
    launch(main)

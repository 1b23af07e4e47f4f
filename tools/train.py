"""Trains a config of mmdet, mmseg or mmpretrain, with or without DenoiseRep."""

import argparse
import os
import sys

from launch import launch, stop


def parse_args() -> argparse.Namespace:
    """Reads the command line; the flags are those of mmdet's own ``tools/train.py``."""
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
        help='continue a run: from this checkpoint, or without a value from the last one in the work dir',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override settings of the config, such as train_dataloader.batch_size=4 or key="[a,b]"',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='how processes were started'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return parser.parse_args()


def main() -> None:
    """Builds the runner and trains."""
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))

    from common import config_at_fault, load_config, start, use_amp, use_cpus
    from mmdenoiserep.engine.resume import allow_training_checkpoints

    cfg = load_config(args)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            stop(f'{args.config} has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
        if cfg.load_from and not os.path.isfile(cfg.load_from):
            stop(f'{cfg.load_from} to resume from does not exist')

    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    allow_training_checkpoints()
    use_cpus(cfg)
    with config_at_fault(args.config):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if 'mmdenoiserep.tasks.reid' in sys.modules:
        runner.register_hook(dict(type='ReIDCheckHook'))
    start(runner, runner.train, args.config, cfg.get('load_from'))


if __name__ == '__main__':
    launch(main)

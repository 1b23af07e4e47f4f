"""Trains a config of mmdet, mmseg or mmpretrain, with or without DenoiseRep."""

import argparse
import os
import sys
from typing import Any

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
        resume(cfg, args.resume)

    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    allow_training_checkpoints()
    use_cpus(cfg)
    with config_at_fault(args.config):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if 'mmdenoiserep.tasks.reid' in sys.modules:
        runner.register_hook(dict(type='ReIDCheckHook'))
    purpose = 'resume' if cfg.get('resume') else 'start'
    start(runner, runner.train, args.config, cfg.get('load_from'), purpose)


def resume(cfg: Any, checkpoint: str) -> None:
    """Lets a run go on from a checkpoint, or with ``'auto'`` from its last one; where it has none, it starts anew."""
    from mmengine.runner import find_latest_checkpoint

    if checkpoint == 'auto':
        if not (last := find_latest_checkpoint(cfg.work_dir)):
            cfg.resume = False  # the weights of load_from count, as in any first start
            return
        # the folder may have another name by now, or be named from another place
        moved = os.path.join(cfg.work_dir, os.path.basename(last))
        checkpoint = moved if os.path.isfile(moved) and not os.path.isfile(last) else last
    if '://' not in checkpoint and not os.path.isfile(os.path.expanduser(checkpoint)):
        stop(f'{checkpoint} to resume from does not exist')
    cfg.resume, cfg.load_from = True, checkpoint


if __name__ == '__main__':
    launch(main)

"""Evaluates a checkpoint with its config of mmdet, mmseg or mmpretrain; a fused one with the vanilla config."""

import argparse
import os

from launch import launch, stop


def parse_args() -> argparse.Namespace:
    """Reads the command line; the flags are those of mmdet's own ``tools/test.py``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for the log (default: work_dirs/<name of the config>)')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this pickle file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='FOLDER', help='draw the predictions into this folder of the work dir')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between two shown pictures (default: 2)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override settings of the config, such as test_dataloader.batch_size=4 or key="[a,b]"',
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation, where the config defines it')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='how processes were started'
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
    if '://' not in args.checkpoint and not os.path.isfile(args.checkpoint):
        stop(f'the checkpoint {args.checkpoint} does not exist')

    from common import config_at_fault, draw_predictions, load_config, start, use_cpus, use_tta
    from mmdenoiserep.engine.resume import allow_training_checkpoints

    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False  # a config may say that its training is resumed
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.tta:
        use_tta(cfg)

    from mmengine.evaluator import DumpResults
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    allow_training_checkpoints()
    use_cpus(cfg)
    with config_at_fault(args.config):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if args.out:
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    start(runner, runner.test, args.config, args.checkpoint, 'test')


if __name__ == '__main__':
    launch(main)

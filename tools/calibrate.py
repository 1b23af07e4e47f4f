"""Denoises a trained model without training it, from unlabelled images.

schedule  sets the denoisers of a config with DenoiseRepBackbone to the exact optimum of their loss; OUT is an ordinary
          denoised checkpoint, for test.py and fuse_checkpoint.py.
moments   gathers the moments of all layers in the training domain; OUT is what the next mode takes as --source.
domain    fits the model to images of the place where it will run; OUT is a vanilla checkpoint, which the config
          without denoising loads as it is.
"""

import argparse
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from launch import launch, stop

FIT = ('source', 'representative', 'layers', 'fit', 'rank', 'memory')
IGNORED = {'schedule': FIT, 'moments': (*FIT, 'prior', 'verify', 'plot'), 'domain': ()}
"""Options that mean nothing in a mode."""


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the model, with denoising or without')
    parser.add_argument('checkpoint', help='its trained checkpoint')
    parser.add_argument('output', metavar='OUT', type=Path, help='file to write, OUT.pth')
    parser.add_argument(
        '--mode', choices=['schedule', 'moments', 'domain'], required=True, help='what to do, see above'
    )
    parser.add_argument('--source', metavar='FILE', help='domain mode: moments in the training domain, of this tool')
    images = parser.add_argument_group('images')
    images.add_argument('--images', type=Path, metavar='DIR', help='folder of images; folders in it are searched too')
    images.add_argument(
        '--split',
        choices=['train', 'val', 'test'],
        help='data set of the config instead (default: train; in domain mode test), without augmentation and labels',
    )
    images.add_argument('--num-images', type=int, default=4000, metavar='N', help='at most (default: %(default)s)')
    images.add_argument('--batch-size', type=int, default=32, metavar='N', help='at a time (default: %(default)s)')
    fit = parser.add_argument_group('what is computed')
    fit.add_argument(
        '--representative',
        action='store_true',
        help='the images show the classes about as often as the training images: more layers can be fitted then, '
        'the more the more images there are (default: the covariance of the first layer, but not its mean, whatever '
        'the mix). For small models: with 512 images it destroyed a DINOv2 ViT-S (in percent, clean 100 to 76, blur 90 '
        'to 48, noise 46 to 42; the default gave noise 65, shot 75 instead of 65, blur 93), and fitted to noise it was '
        'useless on clean images (3; MobileNetV2 0.0). One seed, measured once, no command repeats it yet; differences '
        'below 6 points mean nothing; see docs/which-when.md',
    )
    fit.add_argument('--layers', choices=['first', 'early', 'all'], help='choose yourself: first, early half, all')
    fit.add_argument(
        '--fit', choices=['mean', 'diagonal', 'covariance', 'full'], help='choose yourself: which moments are carried'
    )
    fit.add_argument('--rank', type=int, help='choose yourself: rank of a full fit, less the identity; 0 for full')
    fit.add_argument(
        '--prior',
        type=float,
        metavar='N',
        help='images that a prior is worth: the training domain, or in schedule mode equal variances',
    )
    fit.add_argument(
        '--every', type=int, metavar='N', help='take one in N tokens or pixels (default: 16, less if they are few)'
    )
    fit.add_argument(
        '--memory',
        type=float,
        metavar='GIB',
        help='what the features of all images may take; where it is enough, all layers are fitted in one pass, '
        'otherwise each in one of its own (default: 4)',
    )
    parser.add_argument(
        '--verify',
        action='store_true',
        help='compare with the maps as layers of their own; write nothing if it differs',
    )
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='picture of the spectra (default: OUT.png)')
    parser.add_argument('--dry-run', action='store_true', help='print what would be done to the model, write nothing')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument('--allow-pickle', action='store_true', help='read any pickle, which runs code that it brings')
    parser.add_argument('--device', help='such as cpu or cuda:1 (default: cuda where there is one)')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how several processes were started (default: %(default)s)',
    )
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    args = parser.parse_args()
    for name, least in dict(num_images=1, batch_size=1, every=1, rank=0, prior=0, memory=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more')
    if args.mode == 'domain' and not args.source:
        parser.error('--mode domain needs --source FILE')
    ignored = IGNORED[args.mode]
    if wrong := [name for name in ignored if getattr(args, name) is not None and getattr(args, name) is not False]:
        parser.error(f'--mode {args.mode} does not take --{wrong[0]}')
    if args.rank and args.fit in ('mean', 'diagonal'):
        parser.error(f'--fit {args.fit} has no rank')
    if not args.output.name:
        parser.error(f'{args.output} is no file name')
    args.plot = args.plot or args.output.with_suffix('.png')
    if args.mode != 'moments' and args.plot.resolve() == args.output.resolve():
        parser.error(f'{args.output} would be the checkpoint and the picture of the spectra; name it OUT.pth')
    if args.source and Path(args.source).resolve() == args.output.resolve():
        parser.error(f'{args.output} is the source; name another file to write')
    return args


def main() -> None:
    """Calibrates one model."""
    args = parse_args()
    from mmengine.dist import get_rank, init_dist
    from mmengine.logging import MMLogger

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone and VMamba)
    from calibration import Calibration
    from common import config_at_fault, load_config, start_gloo
    from mmdenoiserep.core import CalibrationError
    from mmdenoiserep.core.files.checkpoint import check_target
    from outputs import check_output

    try:
        if not args.dry_run:
            check_target(Path(args.checkpoint), args.output, args.overwrite)
            if args.mode != 'moments':
                check_output(args.plot, '.png', args.overwrite)
        cfg = load_config(argparse.Namespace(config=args.config, cfg_options=args.cfg_options))
        if not start_gloo(args.launcher) and args.launcher != 'none':
            init_dist(args.launcher)
        MMLogger.get_current_instance().setLevel('ERROR')  # the table of the conversion is not news here
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere if get_rank() else sys.stdout):
            with config_at_fault(args.config):
                calibration = Calibration(args, cfg)
            getattr(calibration, args.mode)()
    except CalibrationError as error:
        stop(f'{args.checkpoint} cannot be calibrated: {error}')


if __name__ == '__main__':
    launch(main)

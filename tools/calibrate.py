"""Calibrates a trained model on unlabelled images, without training.

schedule  sets the denoisers of a config with DenoiseRepBackbone to the exact optimum of their loss; OUT is a denoised
          checkpoint, for test.py and fuse_checkpoint.py.
moments   gathers the moments of all layers in the training domain; OUT is a file for --source of domain.
domain    fits the model to some images of the deployment domain, and checks on the others how much of the fit to keep;
          OUT is a vanilla checkpoint, which loads into the config without denoising. If the check refuses the fit, the
          exit code is 3, and nothing is written.
"""

import argparse
import os
import sys
from contextlib import nullcontext, redirect_stdout
from copy import deepcopy
from pathlib import Path

from denoiserep_commands import launch

SPLITS = dict(schedule='train', moments='train', domain='test')


def add_shared_arguments(parser: argparse.ArgumentParser, split: str) -> None:
    """Adds the arguments of all three commands."""
    parser.add_argument('config', help='config of the model, with or without denoising')
    parser.add_argument('checkpoint', help='trained checkpoint of the config')
    parser.add_argument('output', metavar='OUT', type=Path, help='file to write, OUT.pth')
    images = parser.add_argument_group('images')
    images.add_argument('--images', type=Path, metavar='DIR', help='folder of images; its subfolders are searched too')
    images.add_argument(
        '--split',
        choices=['train', 'val', 'test'],
        default=split,
        help='without --images: data set of the config, without augmentation and labels (default: %(default)s)',
    )
    images.add_argument(
        '--num-images', type=int, default=4000, metavar='N', help='largest number of images (default: %(default)s)'
    )
    images.add_argument('--batch-size', type=int, default=32, metavar='N', help='batch size (default: %(default)s)')
    images.add_argument(
        '--stride', type=int, metavar='N', help='take one in N tokens or pixels (default: 1 to 16, chosen by layer)'
    )
    parser.add_argument('--dry-run', action='store_true', help='print the report, but write nothing')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument(
        '--allow-pickle',
        action='store_true',
        help='read any pickle, which can run arbitrary code; only for files you trust',
    )
    parser.add_argument('--device', help='device to compute on, such as cpu or cuda:1 (default: GPU if there is one)')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='launcher of the processes (default: %(default)s)',
    )
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the commands that write a checkpoint and a picture."""
    parser.add_argument(
        '--verify', action='store_true', help='check that folding is exact; write nothing if the outputs differ'
    )
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='plot of the spectra to write (default: none)')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **how)
    commands = parser.add_subparsers(dest='mode', required=True, metavar='{schedule,moments,domain}')
    schedule = commands.add_parser('schedule', description='Sets the denoisers to the exact optimum of their loss.')
    moments = commands.add_parser('moments', description='Gathers the moments of all layers in the training domain.')
    domain = commands.add_parser('domain', description='Fits the model to images of the deployment domain.')
    for name, command in dict(schedule=schedule, moments=moments, domain=domain).items():
        add_shared_arguments(command, SPLITS[name])
    add_output_arguments(schedule)
    add_output_arguments(domain)
    schedule.add_argument(
        '--prior',
        type=float,
        default=0.0,
        metavar='N',
        help='images that a prior of equal variances in unrelated channels is worth (default: %(default)g)',
    )
    domain.add_argument(
        '--source', type=Path, metavar='FILE', required=True, help='output of calibrate.py moments for this checkpoint'
    )
    domain.add_argument(
        '--accept',
        choices=['first', 'early', 'all', 'half-strength'],
        help='what to write whatever the check says: the fit of the first layer, of the first half, of all layers, or '
        'of all at half strength (default: what the check on held-out images chooses)',
    )
    domain.add_argument(
        '--memory',
        type=float,
        default=4.0,
        metavar='GIB',
        help='memory in each process for the features of all images, which a fit holds at one layer after the other; '
        'it decides how many images are taken (default: %(default)g)',
    )
    args = parser.parse_args()
    for name, least in dict(num_images=1, batch_size=1, stride=1, prior=0, memory=0).items():
        if getattr(args, name, None) is not None and getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more')
    if not args.output.name:
        parser.error(f'{args.output} is no file name')
    if args.mode != 'moments' and args.plot and args.plot.resolve() == args.output.resolve():
        parser.error(f'{args.output} would be both the checkpoint and the plot; name another file for the plot')
    if args.mode == 'domain' and args.source.resolve() == args.output.resolve():
        parser.error(f'{args.output} is the source; name another file to write')
    return args


def main() -> None:
    """Calibrates one model."""
    args = parse_args()
    from mmengine.dist import get_rank, init_dist
    from mmengine.logging import MMLogger

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone and VMamba)
    from mmdenoiserep.apis.calibration import open_subject
    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.folders import check_outside
    from mmdenoiserep.apis.run import start_gloo
    from mmdenoiserep.core import CalibrationError
    from mmdenoiserep.core.files.atomic import check_output

    if not args.dry_run:
        check_output(args.output, args.overwrite, source=Path(args.checkpoint))
        if args.mode != 'moments' and args.plot:
            check_output(args.plot, args.overwrite, suffix='.png')
            if args.images:
                check_outside(args.plot, args.images)
    cfg = load_config(args.config, args.cfg_options)
    if not start_gloo(args.launcher) and args.launcher != 'none':
        init_dist(args.launcher)
    MMLogger.get_current_instance().setLevel('ERROR')  # hides the report of the conversion
    how = dict(folder=args.images, split=args.split, num_images=args.num_images, batch_size=args.batch_size)
    how |= dict(denoised=args.mode == 'schedule', device=args.device, allow_pickle=args.allow_pickle)
    with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere if get_rank() else sys.stdout):
        try:
            run = dict(schedule=schedule, moments=moments, domain=domain)[args.mode]
            run(args, open_subject(cfg, args.checkpoint, **how))
        except CalibrationError as error:
            raise CalibrationError(f'{args.checkpoint} cannot be calibrated: {error}') from error


def schedule(args: argparse.Namespace, subject) -> None:
    """Solves the denoisers and writes the denoised checkpoint."""
    from mmdenoiserep.apis import calibration

    report, strides = calibration.solve(subject, args.prior, args.stride, spectra=bool(args.plot))
    if args.verify:
        for name, result in calibration.verify_schedule(subject).items():
            print(f'{name} on two random images, unfused against fused:\n{result}')
    finish(args, subject, report, strides)


def moments(args: argparse.Namespace, subject) -> None:
    """Gathers the moments and writes them."""
    from mmengine.dist import get_rank

    from mmdenoiserep.apis import calibration
    from mmdenoiserep.core import save_moments

    gathered, about = calibration.gather_source(subject, args.stride)
    if warning := calibration.source_warning(subject):
        print(f'warning: {warning}')
    reached = sum(seen.count > 0 for seen in gathered.values())
    print(f'moments of {reached} layers from {about["images"]:,} images, {about["strides"]} of their vectors')
    if not args.dry_run and not get_rank():
        save_moments(gathered, args.output, about)
        print(f'{args.output} is the --source for calibrate.py domain')


def domain(args: argparse.Namespace, subject) -> None:
    """Fits the model to the images, checks the fit on held-out images, and writes the vanilla checkpoint.

    Raises:
        SystemExit: With code 3 if the images support no correction, or something speaks against every candidate.
    """
    from mmdenoiserep.apis import calibration, gate
    from mmdenoiserep.apis.candidates import HALF_STRENGTH, NOTHING, Candidates
    from mmdenoiserep.apis.distances import Distances
    from mmdenoiserep.core import CalibrationError

    source, about = calibration.load_source(subject, args.source)
    reason = gate.why_not_comparable(subject, subject.images)
    if reason and not args.accept:
        raise CalibrationError(f'{reason}, so the fit cannot be checked; choose what to write with --accept')
    held = None if reason else gate.hold_out(subject)
    candidates = Candidates(subject.part, subject.layers)
    before = deepcopy(subject.part) if args.verify else None
    how = dict(stride=args.stride, memory=args.memory, spectra=bool(args.plot), maps=args.verify)
    report, strides = calibration.fit(subject, source, progress=candidates.note, **how)
    name = args.accept
    if held is None:
        print(f'{reason}, so the fit is not checked')
    else:
        evidence = gate.gather_evidence(subject, candidates, held, source, Distances.read(about))
        print(evidence)
        if doubt := evidence.doubt:
            print(f'warning: {doubt}')
        name = name or gate.decide(evidence.scores, evidence.distances)
        if name == NOTHING:
            print(f'nothing was written: {gate.explain_nothing(evidence)}')
            raise SystemExit(3)
    if before is not None:
        whole = 'all' if name == HALF_STRENGTH else name  # halves are means of weights that are verified
        result = calibration.verify_fit(before, subject, gate.keep(subject, candidates, whole, report))
        print(f'one image and noise, maps as separate layers against maps folded into the weights:\n{result}')
        print('the weights fit the config without denoising exactly')
    report = gate.keep(subject, candidates, name, report)
    print(f'chosen: {name}' + ' (--accept)' * bool(args.accept))
    finish(args, subject, report, strides, source)


def finish(args: argparse.Namespace, subject, report, strides: str, source=None) -> None:
    """Prints the report and writes the checkpoint, and the plot if one is asked for, in the process of rank 0."""
    from mmengine.dist import get_rank

    from mmdenoiserep.apis.calibration import warnings_of
    from mmdenoiserep.apis.figures import draw_calibration
    from mmdenoiserep.core.files.atomic import write_file
    from mmdenoiserep.core.files.checkpoint import write_atomically

    if get_rank():
        return
    print(report)
    print(f'sampled {strides} of the vectors')
    for sentence in warnings_of(report, list(subject.layers)):
        print(f'warning: {sentence}')
    if args.dry_run:
        print('nothing was written (--dry-run)')
        return
    with write_file(args.plot) if args.plot else nullcontext() as file:
        if file:
            draw_calibration(report, source).savefig(file, format='png', dpi=100)
            file.flush()  # fails on a full disk before the checkpoint is written
        write_atomically(dict(meta=subject.meta, state_dict=subject.model.cpu().state_dict()), args.output)
    loads = 'the config without denoising' if report.mode == 'domain' else args.config
    print(f'{args.output} loads into {loads}' + (f'; spectra: {args.plot}' if args.plot else ''))


if __name__ == '__main__':
    launch(main)

"""Draws what a model makes of clean and of corrupted images, before and after denoising or a domain fit.

OUT gets signal_to_noise.png (each layer), spectra.png (some layers), embedding.png, features_1.png, features_2.png and
so on (one image each), and, where the model has them, attention.png and predictions.png; a table is printed.

With x the output of a layer for clean images, x~ that for the same images corrupted, and mu the mean of x,

    SNR = 10 log10( E|x - mu|^2 / E|x~ - x|^2 )  dB

before: x and x~ of BEFORE; after: x and x~ of AFTER; restored: x of BEFORE, x~ of AFTER, which is what counts where the
rest of the model is as it was.
"""

import argparse
import re
from pathlib import Path

from denoiserep_commands import launch

CORRUPTIONS = ('noise', 'blur', 'jpeg', 'contrast', 'occlusion', 'shot')
FIGURE = re.compile(r'(signal_to_noise|spectra|embedding|attention|predictions|features_\d+)\.png')
"""Names of what is written, which ``--overwrite`` may replace."""


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the model')
    parser.add_argument('before', metavar='BEFORE.pth', help='checkpoint as trained')
    parser.add_argument('after', metavar='AFTER.pth', help='checkpoint as fused or fitted; denoisers in it are fused')
    parser.add_argument('--out', type=Path, required=True, metavar='OUT', help='folder to write')
    parser.add_argument(
        '--images',
        type=Path,
        metavar='DIR',
        help='folder of clean images; folders in it are searched too (default: the test data set of the config)',
    )
    parser.add_argument(
        '--corrupt', choices=CORRUPTIONS, default='noise', help='what is done to them (default: %(default)s)'
    )
    parser.add_argument('--severity', type=float, help='how much, as in corrupt_images.py, which has the defaults')
    parser.add_argument('--seed', type=int, default=0, help='of the corruption (default: %(default)s)')
    parser.add_argument(
        '--num-images', type=int, default=200, metavar='N', help='at most, for the curves (default: %(default)s)'
    )
    parser.add_argument('--show', type=int, default=4, metavar='N', help='images that are shown (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=8, metavar='N', help='at a time (default: %(default)s)')
    parser.add_argument('--spectra', nargs='+', metavar='LAYER', help='layers of spectra.png (default: nine of them)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    parser.add_argument('--device', help='such as cpu or cuda:1 (default: cuda where there is one)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    args = parser.parse_args()
    for name, least in dict(num_images=2, show=1, batch_size=1).items():
        if getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more')
    if args.seed < 0:
        parser.error('--seed must be 0 or more')
    return args


def main() -> None:
    """Runs both models on clean and on corrupted images and writes the figures."""
    args = parse_args()
    import sklearn  # noqa: F401  (for the embedding; if it is missing, that is told before anything is computed)
    from mmengine.logging import MMLogger

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone and VMamba)
    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.figures import table, write_figures
    from mmdenoiserep.apis.visualization import Visualization
    from mmdenoiserep.core.files.atomic import check_folder, write_folder

    check_folder(args.out, lambda path: FIGURE.fullmatch(path.name), args.overwrite)
    cfg = load_config(args.config, args.cfg_options)
    MMLogger.get_current_instance().setLevel('ERROR')
    visualization = Visualization(
        cfg,
        args.before,
        args.after,
        folder=args.images,
        corruption=args.corrupt,
        severity=args.severity,
        seed=args.seed,
        num_images=args.num_images,
        shown=args.show,
        batch_size=args.batch_size,
        spectra=args.spectra,
        device=args.device,
    )
    curves = visualization.measure()
    views = visualization.look()
    with write_folder(args.out) as folder:
        names = write_figures(folder, curves, views, visualization.severity)
    print(table(curves))
    for sentence in visualization.missing(views):
        print(sentence)
    print(f'{args.out}: {", ".join(names)}')


if __name__ == '__main__':
    launch(main)

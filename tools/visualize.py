"""Compares the features of a model before and after denoising or a domain fit, on clean and corrupted images.

Writes signal_to_noise.png (each layer), spectra.png (some layers), embedding.png, features_1.png, features_2.png, ...
(one image each) and, where the model has them, attention.png and predictions.png to OUT, and prints a table.

The signal-to-noise ratio of a layer with output x on clean images and x~ on the same images corrupted, mu = E x, is

    SNR = 10 log10( E|x - mu|^2 / E|x~ - x|^2 )  dB

before:   x and x~ from BEFORE
after:    x and x~ from AFTER
restored: x from BEFORE, x~ from AFTER; the one that counts if the layers behind the backbone are the same
"""

import argparse
import re
from pathlib import Path

from denoiserep_commands import launch

CORRUPTIONS = ('noise', 'blur', 'jpeg', 'contrast', 'occlusion', 'shot', 'colour', 'haze', 'mixture', 'varying')
FIGURE = re.compile(r'(signal_to_noise|spectra|embedding|attention|predictions|features_\d+)\.png')
"""Names of the figures, which ``--overwrite`` may replace."""


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of both checkpoints')
    parser.add_argument('before', metavar='BEFORE.pth', help='checkpoint before denoising or a domain fit')
    parser.add_argument('after', metavar='AFTER.pth', help='checkpoint after it; denoisers in it are fused')
    parser.add_argument('--out', type=Path, required=True, metavar='OUT', help='folder to write')
    parser.add_argument(
        '--images',
        type=Path,
        metavar='DIR',
        help='folder of clean images; its subfolders are searched too (default: the test data set of the config)',
    )
    parser.add_argument(
        '--corrupt', choices=CORRUPTIONS, default='noise', help='corruption of the images (default: %(default)s)'
    )
    parser.add_argument('--severity', type=float, help='severity of the corruption, see corrupt_images.py --help')
    parser.add_argument('--seed', type=int, default=0, help='seed of the corruption (default: %(default)s)')
    parser.add_argument(
        '--num-images',
        type=int,
        default=200,
        metavar='N',
        help='largest number of images for the statistics of the layers (default: %(default)s)',
    )
    parser.add_argument(
        '--show', type=int, default=4, metavar='N', help='number of images to draw (default: %(default)s)'
    )
    parser.add_argument(
        '--batch-size', type=int, default=8, metavar='N', help='batch size of the statistics (default: %(default)s)'
    )
    parser.add_argument('--spectra', nargs='+', metavar='LAYER', help='layers of spectra.png (default: nine of them)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    parser.add_argument('--device', help='device to compute on, such as cpu or cuda:1 (default: GPU if there is one)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    args = parser.parse_args()
    for name, least in dict(num_images=2, show=1, batch_size=1).items():
        if getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more')
    if args.seed < 0:
        parser.error('--seed must be 0 or more')
    return args


def main() -> None:
    """Runs both models on clean and corrupted images and writes the figures."""
    args = parse_args()
    import sklearn  # noqa: F401  (draws the embedding; fails here if it is missing, before anything is computed)
    from mmengine.logging import MMLogger

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone and VMamba)
    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.figures import table, write_figures
    from mmdenoiserep.apis.folders import check_outside
    from mmdenoiserep.apis.visualization import Visualization
    from mmdenoiserep.core.files.atomic import check_folder, write_folder

    check_folder(args.out, lambda path: FIGURE.fullmatch(path.name), args.overwrite)
    if args.images:
        check_outside(args.out, args.images)
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
    statistics = visualization.measure()
    views = visualization.look()
    with write_folder(args.out) as folder:
        names = write_figures(folder, statistics, views, visualization.severity)
    print(table(statistics))
    for sentence in visualization.missing(views):
        print(sentence)
    print(f'{args.out}: {", ".join(names)}')


if __name__ == '__main__':
    launch(main)

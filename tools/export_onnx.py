"""Exports the deployed part of a fused model as an ONNX file and checks it with onnxruntime.

Classifiers and segmentors are exported up to their logits, detectors up to the neck. The input is a batch of images as
the data preprocessor of the config gives them, (N, C, H, W), float32. If onnxruntime and torch differ, nothing is
written.
"""

import argparse
from pathlib import Path

from denoiserep_commands import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the model, with or without denoising')
    parser.add_argument('checkpoint', help='fused or vanilla checkpoint of the config')
    parser.add_argument('output', metavar='OUT', type=Path, help='file to write, OUT.onnx')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='size of the images in pixels, fixed in the file (default: img_size of the backbone, or 224)',
    )
    parser.add_argument('--dynamic-batch', action='store_true', help='accept any batch size (default: one image)')
    parser.add_argument(
        '--dynamo',
        action='store_true',
        help='use the exporter of torch based on torch.export: more operators (UPerNet, PSPNet need it), but slower',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    args = parser.parse_args()
    if args.size and min(args.size) < 1:
        parser.error('--size must be 1 or more')
    return args


def main() -> None:
    """Exports one model."""
    args = parse_args()
    import mmdenoiserep  # noqa: F401  (registers VMamba)
    from mmdenoiserep.apis.config import load_config
    from mmdenoiserep.apis.export import export_file

    how = dict(size=args.size, dynamic_batch=args.dynamic_batch, dynamo=args.dynamo, overwrite=args.overwrite)
    cfg = load_config(args.config, args.cfg_options)
    for batch, difference in export_file(cfg, args.checkpoint, args.output, **how).items():
        print(f'{batch} images: onnxruntime differs from torch by {difference:.1e} of the largest output')
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    launch(main)

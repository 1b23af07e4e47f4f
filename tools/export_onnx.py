"""Writes the part of a fused model that is deployed as an ONNX file, and checks it in onnxruntime.

That part is a classifier or segmentor up to its logits, and the backbone and neck of a detector. It takes images as the
data preprocessor of the config makes them, (N, C, H, W), float32. Nothing is written if onnxruntime does not give what
torch gives.
"""

import argparse
import re
import tempfile
from pathlib import Path

from launch import launch, stop


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the model, with denoising or without')
    parser.add_argument('checkpoint', help='its fused or vanilla checkpoint')
    parser.add_argument('output', metavar='OUT', type=Path, help='file to write, OUT.onnx')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the images in pixels; it is fixed in the file (default: img_size of the backbone, or 224)',
    )
    parser.add_argument(
        '--dynamic-batch', action='store_true', help='take any number of images at a time (default: one)'
    )
    parser.add_argument(
        '--dynamo',
        action='store_true',
        help='take the newer exporter of torch, which knows more operators and takes longer (UPerNet, PSPNet need it)',
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
    from common import load_config
    from outputs import check_output, written_whole

    check_output(args.output, '.onnx', args.overwrite)
    import torch

    import mmdenoiserep  # noqa: F401  (registers VMamba)
    from deployment import (
        TOLERANCE,
        Deployed,
        export_onnx,
        image_shape,
        largest_difference,
        load_fused,
        random_images,
        run_onnx,
    )
    from mmdenoiserep.apis.errors import is_from_user

    cfg = load_config(args)
    model = Deployed(load_fused(cfg, args.config, args.checkpoint))
    shape = image_shape(cfg, model, args.size)
    with tempfile.TemporaryDirectory() as folder:  # exporters want a path
        temporary = Path(folder, 'model.onnx')
        runs = False
        try:
            with torch.no_grad():
                model(random_images(1, shape))
            runs = True
            export_onnx(model, shape, temporary, args.dynamic_batch, args.dynamo)
            for batch in (1, 2, 3) if args.dynamic_batch else (1,):
                images = random_images(batch, shape)
                with torch.no_grad():
                    difference = largest_difference(run_onnx(temporary, images), model(images))
                print(f'{batch} images: onnxruntime differs from torch by {difference:.1e} of the largest output')
                if difference > TOLERANCE:
                    raise ValueError(f'onnxruntime differs from torch by {difference:.1e}, more than {TOLERANCE:.0e}')
        except Exception as error:  # exporters and runtimes fail in many ways
            if not runs and is_from_user(error):
                raise  # the author of a model wants the traceback
            how = 'with --dynamic-batch; leave that out, for one image' if args.dynamic_batch else 'for one image'
            reason = re.split(r'\n|\. ', str(error).strip())[0]
            stop(f'{args.config} cannot be exported {how} {shape} ({type(error).__name__}: {reason})')
        with written_whole(args.output) as file:
            file.write(temporary.read_bytes())
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    launch(main)

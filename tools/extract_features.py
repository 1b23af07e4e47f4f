"""Writes the features of all images in a folder: what a re-identification model compares, before normalisation.

The file has ``features`` (N, C), float32, and ``paths`` (N,), relative to the folder with ``/``, in sorted order.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from launch import launch, stop


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config with a re-identification head and a test pipeline')
    parser.add_argument('checkpoint', help='its checkpoint, denoised or fused as the config is')
    parser.add_argument('images', type=Path, help='folder of images; folders in it are searched too')
    parser.add_argument('output', type=Path, help='file to write, OUT.npz')
    parser.add_argument('--batch-size', type=int, default=64, help='images at a time (default: %(default)s)')
    parser.add_argument('--device', help='such as cpu or cuda:1 (default: cuda where there is one)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    parser.add_argument('--overwrite', action='store_true', help='replace the output if it exists')
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error('--batch-size must be 1 or more')
    return args


def main() -> None:
    """Extracts the features and writes them."""
    args = parse_args()
    import numpy as np
    from mmengine.dataset import pseudo_collate
    from tqdm import tqdm

    from common import config_at_fault, load_config
    from mmdenoiserep.apis.images import NoImage, open_images
    from outputs import check_output, written_whole

    check_output(args.output, '.npz', args.overwrite)
    if not os.path.isdir(args.images):
        stop(f'{args.images} is not a folder')
    if '://' not in args.checkpoint and not os.path.isfile(args.checkpoint):
        stop(f'the checkpoint {args.checkpoint} does not exist')
    cfg = load_config(args)
    model, missing = build_model(cfg, args.config, args.checkpoint, args.device)
    with config_at_fault(args.config):
        dataset = open_images(cfg, folder=args.images, model=model)
    features: list[Any] = []
    paths: list[str] = []
    for start in tqdm(range(0, len(dataset), args.batch_size), unit='batch'):
        batch = []
        for i in range(start, min(start + args.batch_size, len(dataset))):
            path, image = Path(dataset.info(i)['img_path']), dataset[i]
            if isinstance(image, NoImage):
                if not image.left_out:
                    stop(image.sentence)
                print(image.sentence)
                continue
            batch.append(image)
            paths.append(path.relative_to(args.images).as_posix())
        if not batch:
            continue
        with config_at_fault(args.config):
            features.append(predict(model, pseudo_collate(batch), args.config))
        if not np.isfinite(features[-1]).all():
            reason = f': {args.checkpoint} has no {missing[0]}, {len(missing)} are missing' if missing else ''
            stop(f'the features of {args.images / paths[-len(batch)]} and others are not finite{reason}')
    if not features:
        stop(f'no image of {args.images} is left')
    with written_whole(args.output) as file:
        np.savez(file, features=np.concatenate(features), paths=np.array(paths))
    print(f'{args.output}: {len(paths):,} images, {features[0].shape[1]} channels')


def build_model(cfg: Any, config: str, checkpoint: str, device: str | None) -> tuple[Any, list[str]]:
    """Returns the model with the weights, in eval mode, and the parameters that the checkpoint lacks.

    These are NaN, so that the features are, too, if they depend on one. A classifier that is not used may be missing,
    statistics of BatchNorm layers may not.
    """
    import torch
    from mmengine.runner import CheckpointLoader
    from mmengine.runner.checkpoint import _load_checkpoint_to_model

    from mmdenoiserep.apis.weights import Loading
    from mmdenoiserep.core import InputError
    from mmdenoiserep.engine.resume import allow_training_checkpoints
    from opening import build, to_device

    model = build(cfg, config, denoised=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    allow_training_checkpoints()
    loading = Loading(model, checkpoint, 'features')
    try:
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent')
    except InputError:
        raise
    except Exception as error:  # addresses fail in many ways
        stop(f'{checkpoint} cannot be loaded ({type(error).__name__}: {error})')
    loading.unwrap(content)
    loading.see(content)
    _load_checkpoint_to_model(model, content, logger='silent')
    loading.judge()
    to_device(model, device)
    return model, [name for name, parameter in model.named_parameters() if parameter.isnan().all()]


def predict(model: Any, batch: dict[str, Any], config: str) -> Any:
    """Returns the features (B, C) of a batch, a float32 array."""
    import torch

    with torch.no_grad():
        samples = model.test_step(batch)
    features = [getattr(sample, 'pred_feature', None) for sample in samples]
    if any(feature is None for feature in features):
        stop(f'the model of {config} predicts no pred_feature; it needs a head such as BNNeckReIDHead')
    return torch.stack(features).float().cpu().numpy()


if __name__ == '__main__':
    launch(main)

"""Prints which layers of a config's backbones get a denoiser, and which can't, without training or loading anything."""

import argparse
from copy import deepcopy

from launch import launch


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config with DenoiseRepBackbone, or one of your own without it')
    parser.add_argument(
        '--targets',
        nargs='+',
        metavar='TARGET',
        help='try these instead: mlp, linear, conv2d, all, or regular expressions that match a whole name',
    )
    parser.add_argument('--exclude', nargs='+', metavar='REGEX', help='names to leave out')
    parser.add_argument('--rank', type=int, help='rank of the denoisers, 0 for full (default: that of the config)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    return parser.parse_args()


def main() -> None:
    """Builds the backbones, one after the other, and prints the table of each conversion."""
    args = parse_args()
    from mmengine.logging import MMLogger
    from mmengine.registry import MODELS

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone for configs that do not import it)
    from common import config_at_fault, load_config, set_default_scope
    from mmdenoiserep.apis.backbones import backbone_configs, denoised_configs
    from mmdenoiserep.engine.backbone import find_guards

    cfg = load_config(args)
    options = {key: value for key, value in dict(targets=args.targets, exclude=args.exclude).items() if value}
    if args.rank is not None:
        options['rank'] = args.rank or None
    MMLogger.get_current_instance().setLevel('ERROR')  # the table is printed once, below
    with config_at_fault(args.config):
        set_default_scope(cfg)
        configs = deepcopy(backbone_configs(cfg.get('model') or {}))
        if not any(denoised_configs(config) for config in configs.values()):
            configs = {path: dict(type='DenoiseRepBackbone', backbone=config) for path, config in configs.items()}
        for config in configs.values():
            for denoised in denoised_configs(config):
                denoised.update(options)
        models = {path: MODELS.build(config) for path, config in configs.items() if denoised_configs(config)}
    for path, model in models.items():
        for _, module, guard in find_guards(model):
            place = f'model.{path}: ' if len(models) > 1 else ''
            print(f'{place}{type(module).__module__}.{type(module).__qualname__}')
            print(guard.report)


if __name__ == '__main__':
    launch(main)

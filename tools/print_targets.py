"""Prints which layers of a config's backbone get a denoiser, and which can't, without training or loading anything."""

import argparse

from launch import launch, stop


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
    """Builds the backbone and prints the table of its conversion."""
    args = parse_args()
    from mmengine.logging import MMLogger
    from mmengine.registry import MODELS

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone for configs that do not import it)
    from common import config_at_fault, load_config, set_default_scope, without_denoising
    from mmdenoiserep.engine.backbone import find_guards

    cfg = load_config(args)
    options = dict(targets=args.targets, exclude=args.exclude)
    MMLogger.get_current_instance().setLevel('ERROR')  # the table is printed once, below
    with config_at_fault(args.config):
        if not cfg.get('model', {}).get('backbone'):
            stop(f'{args.config} has no model.backbone')
        set_default_scope(cfg)
        inner = without_denoising(cfg.model.backbone)
        denoised = inner != cfg.model.backbone
        backbone = cfg.model.backbone if denoised else dict(type='DenoiseRepBackbone', backbone=inner)
        backbone.update({key: value for key, value in options.items() if value is not None})
        if args.rank is not None:
            backbone['rank'] = args.rank or None
        model = MODELS.build(backbone)
    for _, module, guard in find_guards(model):
        print(f'{type(module).__module__}.{type(module).__qualname__}')
        print(guard.report)


if __name__ == '__main__':
    launch(main)

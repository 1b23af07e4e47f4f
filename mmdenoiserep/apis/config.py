"""Reads a config and applies the options of the tools to it."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import init_default_scope

from ..engine.resume import allow_plain_classes
from .errors import ConfigError, config_name, find_missing, importing_place, is_from_user

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def name_config_packages() -> None:
    """Tells mmengine which packages the configs of ``mmseg::`` and ``mmdenoiserep::`` are in.

    mmengine looks for the distribution mmsegmentation, which has another name in the maintained fork of OpenMMLab.
    """
    if find_spec('mmseg') and not any(distributions(name='mmsegmentation')):
        MODULE2PACKAGE['mmseg'] = 'mmseg'
    MODULE2PACKAGE['mmdenoiserep'] = 'mmdenoiserep'


def load_config(
    path: str | Path,
    options: Sequence[str] | None = None,
    work_dir: str | Path | None = None,
    launcher: str | None = None,
) -> Config:
    """Reads a config and imports its ``custom_imports`` and the library of its default scope.

    Args:
        path: Path of the config.
        options: Settings to override, each ``KEY=VALUE``, as after ``--cfg-options``.
        work_dir: Folder of a run; None takes ``work_dir`` of the config, or ``work_dirs/<name of the config>``.
        launcher: Launcher of a run: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``; None takes ``launcher`` of the
            config, or ``'none'``.

    Raises:
        ConfigError: The config can't be read, or the options do not fit it.
        ModuleNotFoundError: The config needs a library that is not installed.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py', ['model.head.num_classes=5'])
        >>> cfg.model.head.num_classes
        5
    """
    if not isinstance(path, str | Path) or not os.path.isfile(path):
        raise ConfigError(f'the config {path or repr(path)} cannot be read: it is no file')
    name_config_packages()
    try:
        cfg = Config.fromfile(path)
        if (scope := cfg.get('default_scope')) in LIBRARIES:
            import_module(scope)
    except Exception as error:  # a config is a program and may fail in any way
        if name := find_missing(error):
            who = importing_place(error) or f'the config {path}'
            raise ModuleNotFoundError(f'{who} needs {name}', name=name) from error
        if is_from_user(error):  # a module of custom_imports
            raise
        reason = str(error).partition(', the current sys.path')[0]  # of custom_imports
        raise ConfigError(f'the config {path} cannot be read ({type(error).__name__}: {reason})') from error
    imports = (cfg.get('custom_imports') or {}).get('imports') or ()
    allow_plain_classes([imports] if isinstance(imports, str) else imports)
    _drop_scope(cfg._cfg_dict, 'mmdenoiserep')
    if options:
        parsed = _parse_options(options)
        try:
            cfg.merge_from_dict(parsed)
        except Exception as error:  # the path of a key may lead through any object
            raise ConfigError(f'the options do not fit {path} ({type(error).__name__}: {error})') from error
    if work_dir:
        cfg.work_dir = str(work_dir)
    if launcher is not None:
        cfg.launcher = launcher
        set_run_defaults(cfg)
    return cfg


def set_run_defaults(cfg: Config) -> None:
    """Sets the launcher and the work dir of a config, which a run needs, if it has none."""
    if not cfg.get('launcher'):
        cfg.launcher = 'none'
    if not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(cfg.filename or 'config').stem)


def _drop_scope(config: Any, scope: str) -> None:
    """Removes a scope without registries, which mmengine adds to inherited dicts."""
    if isinstance(config, dict):
        if config.get('_scope_') == scope:
            del config['_scope_']
        config = list(dict.values(config))  # does not build lazy objects
    if isinstance(config, list | tuple):
        for value in config:
            _drop_scope(value, scope)


def _parse_options(options: Sequence[str]) -> dict:
    """Parses ``KEY=VALUE`` words with mmengine's ``DictAction``."""
    for option in options:
        if not isinstance(option, str) or not re.match(r'[^-=][^=]*=', option):
            raise ConfigError(f'an option must be KEY=VALUE, got {option!r}')
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    try:
        return parser.parse_args(['--options', *options]).options
    except Exception as error:  # unbalanced brackets, for example
        raise ConfigError(f'the options cannot be read ({type(error).__name__}: {error})') from error


def set_default_scope(cfg: Config) -> None:
    """Sets the default scope as a runner does; lazy configs have ``default_scope = None``, which sets none."""
    if scope := cfg.get('default_scope', 'mmengine'):
        init_default_scope(scope)


def type_name(config: Mapping[str, Any]) -> str:
    """Returns the name of the class that a config builds, without scope; lazy configs hold the class itself."""
    kind = config.get('type', '')
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def without_denoising(model: Any) -> Any:
    """Returns a model config in which every DenoiseRepBackbone is replaced by the backbone inside it."""
    if isinstance(model, dict):
        if type_name(model) == 'DenoiseRepBackbone':
            inner = without_denoising(model['backbone'])
            return inner if model.get('pretrained') is None else ConfigDict(inner, pretrained=model['pretrained'])
        # dict.items does not build lazy objects
        return ConfigDict({key: without_denoising(value) for key, value in dict.items(model)})
    return type(model)(map(without_denoising, model)) if isinstance(model, list | tuple) else model


def use_amp(cfg: Config) -> None:
    """Switches the optimizer wrapper of a config to automatic mixed precision.

    Raises:
        ConfigError: The config has no optimizer wrapper, or one of another kind.
    """
    wrapper = cfg.get('optim_wrapper')
    if not wrapper or type_name(wrapper) not in ('', 'OptimWrapper', 'AmpOptimWrapper'):
        kind = type_name(wrapper) if wrapper else 'no optim_wrapper'
        raise ConfigError(f'--amp needs an OptimWrapper, but {config_name(cfg)} has {kind}')
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Enables the automatic scaling of the learning rate with the batch size in a config.

    Raises:
        ConfigError: The config has no ``auto_scale_lr.base_batch_size``.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ConfigError(f'{config_name(cfg)} has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs')
    cfg.auto_scale_lr.enable = True


def enable_visualization_hook(cfg: Config, folder: str | None = None, window: bool = False, seconds: float = 2) -> None:
    """Enables the visualization hook of a config, whatever the library names its options.

    Args:
        cfg: The config.
        folder: Subfolder of the work dir for the pictures; None writes none.
        window: Whether to show the pictures in a window.
        seconds: Time between two windows, in seconds.

    Raises:
        ConfigError: The config has no ``default_hooks.visualization``.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ConfigError(f'{config_name(cfg)} has no default_hooks.visualization, which --show and --show-dir need')
    kind = type_name(hook)  # mmpretrain's is VisualizationHook, mmseg's SegVisualizationHook
    switch = 'enable' if kind == 'VisualizationHook' else 'draw'
    hook.update({switch: True}, show=window, wait_time=seconds, interval=1)
    if folder and kind == 'SegVisualizationHook':
        cfg.visualizer.save_dir = folder
    elif folder:
        hook['out_dir' if kind == 'VisualizationHook' else 'test_out_dir'] = folder


def use_tta(cfg: Config) -> None:
    """Enables the test-time augmentation of a config: ``tta_model`` and ``tta_pipeline``.

    Raises:
        ConfigError: The config has no ``tta_model`` or ``tta_pipeline``, or its test data set is built already.
    """
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ConfigError(f'--tta needs tta_model and tta_pipeline in {config_name(cfg)}')
    from .images import datasets_of, leaves

    for dataset in datasets_of(cfg, 'test'):
        for leaf in leaves(dataset):
            if not isinstance(leaf, dict):
                raise ConfigError(
                    f'--tta needs the config of the test data set, not a {type(leaf).__name__} that is built already'
                )
            leaf['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(cfg.tta_model, module=cfg.model)

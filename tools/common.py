"""What the tools share: reading a config, changing it, and running with it."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import init_default_scope

from launch import describe_missing, stop
from mmdenoiserep.apis.errors import is_from_user
from mmdenoiserep.engine.resume import allow_plain_classes


@contextmanager
def config_at_fault(path: str) -> Iterator[None]:
    """Ends the program with a sentence that blames a config for whatever goes wrong while it is turned into objects."""
    from mmdenoiserep.core import InputError

    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a config names may fail in any way
        if describe_missing(error) or is_from_user(error):
            raise  # launch() says what to install; the author of a model wants the traceback
        stop_for_config(path, error)


def stop_for_config(path: str, error: Exception) -> NoReturn:
    """Ends the program with a sentence that blames a config."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error  # a KeyError quotes its message
    stop(f'the config {path} does not work ({type(error).__name__}: {reason})')


def load_config(args: argparse.Namespace) -> Config:
    """Reads ``args.config`` and applies ``--work-dir``, ``--cfg-options`` and ``--launcher`` where the tool has them.

    The work dir is, in this order: ``--work-dir``, the one in the config, ``work_dirs/<name of the config>``.
    A config that can't be read ends the program with one sentence.
    """
    if find_spec('mmseg') and not any(distributions(name='mmsegmentation')):
        # the maintained fork of the stack ships mmseg under another name, and mmengine looks for the old one
        MODULE2PACKAGE['mmseg'] = 'mmseg'
    MODULE2PACKAGE['mmdenoiserep'] = 'mmdenoiserep'  # for _base_ = 'mmdenoiserep::...'
    try:
        with without_tools():
            cfg = Config.fromfile(args.config)
        if (scope := cfg.get('default_scope')) in ('mmdet', 'mmseg', 'mmpretrain'):
            import_module(scope)
    except Exception as error:  # a config is a program: reading it may fail in any way
        if sentence := describe_missing(error):
            stop(f'the config {args.config} needs {sentence}')
        if is_from_user(error):  # a module of custom_imports
            raise
        stop(f'the config {args.config} cannot be read ({type(error).__name__}: {error})')
    imports = (cfg.get('custom_imports') or {}).get('imports') or ()
    allow_plain_classes([imports] if isinstance(imports, str) else imports)
    drop_scope(cfg._cfg_dict, 'mmdenoiserep')
    if getattr(args, 'cfg_options', None):
        options = parse_options(args.cfg_options)
        try:
            cfg.merge_from_dict(options)
        except Exception as error:  # a key may lead through anything
            stop(f'--cfg-options do not fit {args.config} ({type(error).__name__}: {error})')
    if hasattr(args, 'launcher'):
        cfg.launcher = args.launcher
        cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    return cfg


@contextmanager
def without_tools() -> Iterator[None]:
    """Imports modules of the user that are called as modules of the tools are (common, images, ...), not those.

    What a config imports meanwhile stays under its name; the tools keep what they have imported before.
    """
    folder = Path(__file__).resolve().parent
    path, ours = list(sys.path), {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, '__file__', None)
        if file and name != '__main__' and Path(file).resolve().parent == folder:
            ours[name] = sys.modules.pop(name)
    sys.path[:] = [entry for entry in path if not entry or Path(entry).resolve() != folder]
    try:
        yield
    finally:
        sys.path[:] = [*(entry for entry in path if entry not in sys.path), *sys.path]
        for name, module in ours.items():
            sys.modules.setdefault(name, module)


def drop_scope(config: Any, scope: str) -> None:
    """Removes a package that has no registries of its own from the scopes that mmengine notes at what is inherited."""
    if isinstance(config, dict):
        if config.get('_scope_') == scope:
            del config['_scope_']
        config = list(dict.values(config))  # lazy stays lazy
    if isinstance(config, list | tuple):
        for value in config:
            drop_scope(value, scope)


def parse_options(options: list[str]) -> dict:
    """Turns ``KEY=VALUE`` words into a dict as mmengine's own tools do."""
    if wrong := [option for option in options if '=' not in option]:
        stop(f'--cfg-options takes KEY=VALUE, got {wrong[0]!r}')
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    try:
        return parser.parse_args(['--options', *options]).options
    except Exception as error:  # unbalanced brackets and the like
        stop(f'--cfg-options cannot be read ({type(error).__name__}: {error})')


def start(runner, run: Callable[[], object], config: str, checkpoint: str | None, purpose: str) -> None:
    """Trains or tests with a runner; before the first iteration, bad input ends the program with a sentence.

    Args:
        runner: The runner.
        run: Its ``train`` or ``test``.
        config: Path of its config, to blame for what fails except for the weights.
        checkpoint: Path of these; None for the last checkpoint of the run.
        purpose: ``'start'``, ``'resume'`` or ``'test'``; see :class:`mmdenoiserep.apis.weights.Loading`.

    Raises:
        InputError: The checkpoint can't be read, or does not fit the model.
    """
    from mmdenoiserep.apis.weights import Loading, check_resumable
    from mmdenoiserep.core import InputError

    load, call_hook, begun = runner.load_or_resume, runner.call_hook, False
    what = checkpoint or 'the last checkpoint of this run'
    loading: Loading | None = None

    def load_and_judge() -> None:
        nonlocal loading
        loading = Loading(runner.model, what, purpose)
        try:
            load()
        except InputError:
            raise
        except Exception as error:  # files fail in many ways
            if is_from_user(error):
                raise
            stop(f'{what} cannot be loaded ({type(error).__name__}: {error})')
        if loading.shapes:  # otherwise there was nothing to load
            loading.judge()

    def follow(name: str, **arguments: Any) -> None:
        nonlocal begun
        begun = begun or name in ('before_train_iter', 'before_test_iter')
        if name == 'after_load_checkpoint' and loading:
            if purpose == 'resume':
                check_resumable(arguments['checkpoint'], what)
            loading.unwrap(arguments['checkpoint'])
        call_hook(name, **arguments)
        if name == 'after_load_checkpoint' and loading:
            loading.see(arguments['checkpoint'])

    runner.load_or_resume, runner.call_hook = load_and_judge, follow
    try:
        run()
    except InputError:
        raise
    except Exception as error:
        if begun or is_from_user(error):
            raise  # code of the model or of the data: its author wants the traceback
        stop_for_config(config, error)


def set_default_scope(cfg: Config) -> None:
    """Does what a runner does with ``default_scope``: lazy configs set it to None, and then there is none."""
    if scope := cfg.get('default_scope', 'mmengine'):
        init_default_scope(scope)


def type_name(config: ConfigDict) -> str:
    """Returns the bare name of what a config builds; ``type`` is a name, or in lazy configs the object itself."""
    kind = config.get('type', '')
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def start_gloo(launcher: str) -> bool:
    """Joins the processes of torchrun where there is no GPU, which mmengine can't; returns whether it did.

    Where the processes were not started by the launcher, the program ends with a sentence.
    """
    import torch

    started_by = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_LOCAL_RANK')
    if launcher in started_by and started_by[launcher] not in os.environ:
        stop(f'--launcher {launcher} needs {started_by[launcher]} in the environment; start it by the launcher')
    if launcher != 'pytorch' or torch.cuda.is_available():
        return False
    torch.distributed.init_process_group('gloo')
    return True


def use_cpus(cfg: Config) -> None:
    """Makes the runner of a config work in several processes without GPUs."""
    if start_gloo(cfg.launcher):
        default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg', default), device_ids=None)


def use_amp(cfg: Config) -> None:
    """Switches the optimizer wrapper to automatic mixed precision."""
    wrapper = cfg.get('optim_wrapper')
    if not wrapper or type_name(wrapper) not in ('', 'OptimWrapper', 'AmpOptimWrapper'):
        stop(f'--amp works with OptimWrapper, the config has {type_name(wrapper) if wrapper else "no optim_wrapper"}')
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Makes the visualization hook of the config draw every prediction (each library names its options its own way)."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        stop(f'{args.config} has no default_hooks.visualization, which --show and --show-dir need')
    kind = type_name(hook)  # mmpretrain's is VisualizationHook, mmseg's SegVisualizationHook
    hook.update(
        {'enable' if kind == 'VisualizationHook' else 'draw': True},
        show=args.show,
        wait_time=args.wait_time,
        interval=1,
    )
    if args.show_dir and kind == 'SegVisualizationHook':
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook['out_dir' if kind == 'VisualizationHook' else 'test_out_dir'] = args.show_dir


def use_tta(cfg: Config) -> None:
    """Wraps the model and the test pipeline with the test-time augmentation that the config defines."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        stop('--tta needs tta_model and tta_pipeline in the config')
    from mmdenoiserep.apis.images import datasets_of, leaves

    for dataset in datasets_of(cfg, 'test'):
        for leaf in leaves(dataset):
            if not isinstance(leaf, dict):
                stop(f'--tta needs the config of the test data set, not a {type(leaf).__name__} that is built already')
            leaf['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(cfg.tta_model, module=cfg.model)


def without_denoising(model: ConfigDict) -> ConfigDict:
    """Returns a model config in which every DenoiseRepBackbone is replaced by the backbone inside it."""
    if isinstance(model, dict):
        if type_name(model) == 'DenoiseRepBackbone':
            inner = without_denoising(model['backbone'])
            return inner if model.get('pretrained') is None else ConfigDict(inner, pretrained=model['pretrained'])
        return ConfigDict({key: without_denoising(value) for key, value in dict.items(model)})  # lazy stays lazy
    return type(model)(map(without_denoising, model)) if isinstance(model, list | tuple) else model

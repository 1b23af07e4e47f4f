"""Trains and tests with mmengine's runners, on GPUs or CPUs, in one or several processes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from ..core import InputError
from ..core.files.atomic import check_output
from ..engine.resume import allow_training_checkpoints
from .arguments import checkpoint_path, make_folder, one_of
from .config import set_run_defaults
from .errors import ConfigError, blame, config_at_fault, config_path, is_from_user
from .weights import LoadingCheck, check_resumable

STARTED_BY = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_LOCAL_RANK')
"""The environment variable that each launcher sets in its processes."""


def train(cfg: Config) -> None:
    """Trains the model of a config.

    Args:
        cfg: A config from :func:`~.config.load_config`; it is changed.

    Raises:
        InputError: The config or its ``load_from`` can't be used. Errors after the first iteration begins pass
            unchanged.

    Examples:
        >>> options = ['train_cfg.max_iters=2', 'log_level=ERROR']
        >>> cfg = load_config('configs/demo/vit_fashion-mnist_denoiserep.py', options, 'run', launcher='none')
        >>> cfg.load_from = None
        >>> train(cfg)
        >>> Path('run/iter_2.pth').exists()
        True
    """
    runner = _build_runner(cfg)
    if 'mmdenoiserep.tasks.reid' in sys.modules:
        runner.register_hook(dict(type='ReIDCheckHook'))
    purpose = 'resume' if cfg.get('resume') else 'start'
    _start(runner, runner.train, config_path(cfg), cfg.get('load_from'), purpose)


def test(cfg: Config, checkpoint: str | Path, out: str | Path | None = None) -> None:
    """Evaluates a checkpoint with its config, and logs the metrics.

    Args:
        cfg: A config from :func:`~.config.load_config`; it is changed.
        checkpoint: Path or URL of the checkpoint.
        out: Pickle file for the predictions, which is replaced if it exists; None writes none.

    Raises:
        InputError: The config or the checkpoint can't be used, they do not belong together, or the file can't be
            written.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py', ['log_level=ERROR'], launcher='none')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> test(cfg, 'vit.pth', out='predictions.pkl')
        Loads checkpoint by local backend from path: vit.pth
    """
    config, checkpoint = config_path(cfg), checkpoint_path(checkpoint)
    if out and '://' not in str(out):
        if Path(out).suffix not in ('.pkl', '.pickle'):
            raise InputError(f'{out} must end with .pkl or .pickle')
        make_folder(Path(out).parent)
        check_output(Path(out), overwrite=True)
    cfg.load_from, cfg.resume = checkpoint, False  # the config may resume its training
    runner = _build_runner(cfg)
    if out:
        with config_at_fault(config):
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=str(out)))
    _start(runner, runner.test, config, checkpoint, 'test')


def resume(cfg: Config, checkpoint: str | Path = 'auto') -> None:
    """Makes a run resume from a checkpoint.

    Args:
        cfg: A config from :func:`~.config.load_config`; it is changed.
        checkpoint: Path or URL; ``'auto'`` takes the last checkpoint in the work dir, or starts a new run without one.

    Raises:
        InputError: The checkpoint does not exist.
    """
    set_run_defaults(cfg)
    if checkpoint == 'auto':
        if not (last := find_latest_checkpoint(cfg.work_dir)):
            cfg.resume = False  # a new run starts from load_from
            return
        # the noted path may be outdated: the folder was moved, or is relative to another working directory
        moved = os.path.join(cfg.work_dir, os.path.basename(last))
        checkpoint = moved if os.path.isfile(moved) and not os.path.isfile(last) else last
    cfg.resume, cfg.load_from = True, checkpoint_path(checkpoint)


def start_gloo(launcher: str) -> bool:
    """Initialises gloo for the launcher ``'pytorch'`` without a GPU, which mmengine does not support.

    Returns:
        Whether it did.

    Raises:
        InputError: The launcher is unknown, or did not start the process.
    """
    one_of(('none', *STARTED_BY), launcher=launcher)
    if launcher in STARTED_BY and STARTED_BY[launcher] not in os.environ:
        raise ConfigError(
            f'the launcher {launcher} needs {STARTED_BY[launcher]} in the environment; start the process by it'
        )
    if launcher != 'pytorch' or torch.cuda.is_available():
        return False
    torch.distributed.init_process_group('gloo')
    return True


def _build_runner(cfg: Config) -> Any:
    config = config_path(cfg)
    set_run_defaults(cfg)
    allow_training_checkpoints()
    if start_gloo(cfg.launcher):
        default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg', default), device_ids=None)
    make_folder(cfg.work_dir)
    with config_at_fault(config):
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def _start(runner: Any, run: Callable[[], object], config: str, checkpoint: str | None, purpose: str) -> None:
    """Runs a runner; errors of the libraries before the first iteration become an :class:`InputError`.

    Args:
        runner: The runner.
        run: Its ``train`` or ``test``.
        config: Path of the config, for messages.
        checkpoint: Path of the checkpoint, for messages; None for the last one of the run.
        purpose: ``'start'``, ``'resume'`` or ``'test'``; see :class:`~.weights.LoadingCheck`.

    Raises:
        InputError: The config fails, or the checkpoint can't be read or does not fit the model.
    """
    load, call_hook, begun = runner.load_or_resume, runner.call_hook, False
    what = checkpoint or 'the last checkpoint of this run'
    loading: LoadingCheck | None = None

    def load_and_check() -> None:
        nonlocal loading
        loading = LoadingCheck(runner.model, what, purpose)
        try:
            load()
        except InputError:
            raise
        except Exception as error:  # files fail in many ways
            if is_from_user(error):
                raise
            raise InputError(f'{what} cannot be loaded ({type(error).__name__}: {error})') from error
        if loading.shapes:  # empty if nothing was loaded
            loading.check_model()

    def follow(name: str, **arguments: Any) -> None:
        nonlocal begun
        begun = begun or name in ('before_train_iter', 'before_test_iter')
        if name == 'after_load_checkpoint' and loading:
            if purpose == 'resume':
                check_resumable(arguments['checkpoint'], what)
            loading.unwrap(arguments['checkpoint'])
        call_hook(name, **arguments)
        if name == 'after_load_checkpoint' and loading:
            loading.check_content(arguments['checkpoint'])

    runner.load_or_resume, runner.call_hook = load_and_check, follow
    try:
        run()
    except InputError:
        raise
    except Exception as error:
        if begun or is_from_user(error):
            raise  # a bug in the user's own code: they want the traceback
        raise ConfigError(blame(config, error)) from error

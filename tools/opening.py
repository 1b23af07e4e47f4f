"""Builds the model of a config and loads a checkpoint into it, strictly."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from common import config_at_fault, set_default_scope, without_denoising
from launch import stop
from mmdenoiserep.core import CheckpointError, fuse_state_dict, read_checkpoint
from mmdenoiserep.core.checkpoint import split_checkpoint
from mmdenoiserep.core.fuse import denoiser_keys


def build(cfg: Config, config: str, denoised: bool) -> nn.Module:
    """Returns the model of a config in eval mode, with its denoisers or without, as mmengine's runner builds it.

    It is built from a copy, for some models (DINO) write into their config, and would not be built a second time.

    Args:
        cfg: The config; it is not changed.
        config: Its path, to blame for what goes wrong.
        denoised: Whether to keep what DenoiseRepBackbone adds.
    """
    with config_at_fault(config):
        if not cfg.get('model'):
            stop(f'{config} has no model')
        set_default_scope(cfg)
        model = deepcopy(cfg.model)
        if 'data_preprocessor' in cfg:
            model.setdefault('data_preprocessor', deepcopy(cfg.data_preprocessor))
        return MODELS.build(model if denoised else without_denoising(model)).eval()


def load(
    cfg: Config, config: str, checkpoint: str, *, denoisers: str, allow_pickle: bool = False
) -> tuple[nn.Module, dict]:
    """Returns a model with one ``backbone`` and the weights of a checkpoint, and the checkpoint's meta.

    Args:
        cfg: The config.
        config: Its path.
        checkpoint: Path of the checkpoint.
        denoisers: ``'fold'`` gives the vanilla model, into whose weights those of the file are folded; ``'refuse'`` the
            same, of a file that has none; ``'keep'`` the denoised one, with denoisers of zero where the file has none.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Raises:
        CheckpointError: The file can't be read, has denoisers that are refused, or does not fit.
        FusionError: Its denoisers can't be folded in.
    """
    state, meta = split_checkpoint(read_checkpoint(checkpoint, allow_pickle), Path(checkpoint), [])
    has_some = bool(denoiser_keys(state))
    if has_some and denoisers == 'refuse':
        raise CheckpointError(
            f'{checkpoint} has denoisers; fold them into the weights first: '
            f'tools/fuse_checkpoint.py {checkpoint} FUSED.pth'
        )
    model = build(cfg, config, denoisers == 'keep')
    if not hasattr(model, 'backbone'):
        stop(f'{config} has no model.backbone')
    if denoisers == 'keep':
        start = model.state_dict()
        state = state if has_some else state | {key: start[key] for key in denoiser_keys(start)}
    elif has_some:
        state = fuse_state_dict(state)
    load_strictly(model, state, checkpoint, 'denoised' if denoisers == 'keep' else 'vanilla')
    return model, meta


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], path: str, kind: str) -> None:
    """Loads a state dict that has exactly the names and shapes of a model.

    Args:
        model: The model.
        weights: The state dict.
        path: Its file, for the message.
        kind: ``'denoised'`` or ``'vanilla'``, for the message.

    Raises:
        CheckpointError: The names or shapes differ.
    """
    expected = {name: value.shape for name, value in model.state_dict().items()}
    actual = {name: value.shape for name, value in weights.items()}
    if expected != actual:
        wrong = sorted(set(expected.items()) ^ set(actual.items()))[0][0]
        raise CheckpointError(f'{path} does not fit the {kind} model of the config; first difference: {wrong}')
    # names and shapes are compared above, because some library models drop buffers of their own while loading
    model.load_state_dict(weights, strict=False)


def to_device(model: nn.Module, device: str | None) -> nn.Module:
    """Moves a model to what ``--device`` names, by default to a GPU where there is one."""
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return model.to(device)
    except Exception as error:  # a device of another kind may lack a module, or a driver
        reason = str(error).split('\n')[0]
        stop(f'--device {device} cannot be used ({reason})')

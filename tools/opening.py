"""Builds the model of a config and loads a checkpoint into it, strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from common import config_at_fault, set_default_scope, without_denoising
from launch import stop
from mmdenoiserep.core import CheckpointError, fuse_state_dict, read_checkpoint
from mmdenoiserep.core.checkpoint import split_checkpoint
from mmdenoiserep.core.fuse import DENOISER_KEY


def build(cfg: Config, config: str, denoised: bool) -> nn.Module:
    """Returns the model of a config in eval mode, with its denoisers or without, as mmengine's runner builds it.

    Args:
        cfg: The config.
        config: Its path, to blame for what goes wrong.
        denoised: Whether to keep what DenoiseRepBackbone adds.
    """
    with config_at_fault(config):
        if not cfg.get('model', {}).get('backbone'):
            stop(f'{config} has no model.backbone')
        set_default_scope(cfg)
        model = cfg.model
        if 'data_preprocessor' in cfg:
            model.setdefault('data_preprocessor', cfg.data_preprocessor)
        return MODELS.build(model if denoised else without_denoising(model)).eval()


def load_vanilla(cfg: Config, config: str, checkpoint: str, allow_pickle: bool = False) -> tuple[nn.Module, dict]:
    """Returns the vanilla model of a config with the weights of a checkpoint, whose denoisers are folded in; its meta.

    Raises:
        CheckpointError: The file can't be read, or does not fit.
        FusionError: Its denoisers can't be folded in.
    """
    state, meta = split_checkpoint(read_checkpoint(checkpoint, allow_pickle), Path(checkpoint), [])
    model = build(cfg, config, denoised=False)
    load_strictly(model, fuse_state_dict(state) if has_denoisers(state) else state, checkpoint, 'vanilla')
    return model, meta


def has_denoisers(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has those."""
    return any(map(DENOISER_KEY.fullmatch, state))


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
    except (AssertionError, RuntimeError) as error:
        reason = str(error).split('\n')[0]
        stop(f'--device {device} cannot be used ({reason})')

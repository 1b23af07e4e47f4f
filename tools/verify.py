"""Builds the denoised and the vanilla model of a config and compares them on the same images."""

from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from common import config_at_fault, set_default_scope, stop, without_denoising
from mmdenoiserep.core import CheckpointError, verify_fusion
from mmdenoiserep.engine.backbone import find_guards


def build_both(cfg: Config, path: str) -> tuple[nn.Module, nn.Module]:
    """Returns the denoised and the vanilla model of a config, in eval mode and without loading any weights."""
    with config_at_fault(path):
        set_default_scope(cfg)
        denoised = MODELS.build(cfg.model)
        if not any(find_guards(denoised)):
            stop(f'{path} has no DenoiseRepBackbone; --verify needs the config of the training run')
        return denoised, MODELS.build(without_denoising(cfg.model))


def load_strictly(model: nn.Module, weights: Mapping[str, torch.Tensor], path: str, kind: str) -> None:
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


def compare(denoised: nn.Module, vanilla: nn.Module, state: dict, fused: dict, path: str) -> None:
    """Loads both state dicts, prints how far the outputs of the backbones are apart, and raises if too far.

    Raises:
        CheckpointError: The names or shapes do not fit the config, or a difference is beyond the tolerance.
    """
    load_strictly(denoised, state, path, 'denoised')
    load_strictly(vanilla, fused, path, 'vanilla')
    for name, backbone, guard in find_guards(denoised):
        dtype = next(backbone.parameters()).dtype
        images = torch.randn((2, *guard.image_shape[1:]), generator=torch.Generator().manual_seed(0)).to(dtype)
        result = verify_fusion(backbone, vanilla.get_submodule(name), images)
        print(f'{name} on two random images {tuple(images.shape)}, unfused against fused:\n{result}')
        if not result.ok:
            raise CheckpointError(f'{path}: fused and unfused {name} differ beyond the tolerance; nothing was written')

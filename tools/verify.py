"""Builds the denoised and the vanilla model of a config and compares them on the same images."""

import torch
from mmengine.config import Config
from torch import nn

from launch import stop
from mmdenoiserep.core import CheckpointError, verify_fusion
from mmdenoiserep.engine.backbone import find_guards
from opening import build, load_strictly


def build_both(cfg: Config, path: str) -> tuple[nn.Module, nn.Module]:
    """Returns the denoised and the vanilla model of a config, in eval mode and without loading any weights."""
    denoised = build(cfg, path, denoised=True)
    if not any(find_guards(denoised)):
        stop(f'{path} has no DenoiseRepBackbone; --verify needs the config of the training run')
    return denoised, build(cfg, path, denoised=False)


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
        try:
            result = verify_fusion(backbone, vanilla.get_submodule(name), images)
        except Exception as error:  # a backbone may fail in any way on images that are too small for it
            shape = tuple(images.shape[1:])
            raise CheckpointError(
                f'{name} does not run on images of {shape} ({error}); set image_size of DenoiseRepBackbone'
            ) from None
        print(f'{name} on two random images {tuple(images.shape)}, unfused against fused:\n{result}')
        if not result.ok:
            raise CheckpointError(f'{path}: fused and unfused {name} differ beyond the tolerance; nothing was written')

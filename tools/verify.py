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

    What the files do not hold (all but the LoRA weights, in those of a LoRA model) is the same in both models.

    Raises:
        CheckpointError: The names or shapes do not fit the config, a backbone did not run when it was converted, or a
            difference is beyond the tolerance.
        FusionError: There is nothing to compare in what a backbone returns.
    """
    copy_values(denoised, vanilla)
    load_strictly(denoised, state, path, 'denoised')
    load_strictly(vanilla, fused, path, 'vanilla')
    for name, backbone, guard in find_guards(denoised):
        dtype = next(backbone.parameters()).dtype
        images = torch.randn((2, *guard.image_shape[1:]), generator=torch.Generator().manual_seed(0)).to(dtype)
        if reason := guard.report.probe_failure:
            raise CheckpointError(
                f'{name} does not run on images of {tuple(images.shape[1:])} ({reason}); '
                'set image_size of DenoiseRepBackbone'
            )
        result = verify_fusion(backbone, vanilla.get_submodule(name), images)
        print(f'{name} on two random images {tuple(images.shape)}, unfused against fused:\n{result}')
        if not result.ok:
            raise CheckpointError(f'{path}: fused and unfused {name} differ beyond the tolerance; nothing was written')


@torch.no_grad()
def copy_values(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters and buffers that two models have under the same names, whatever their state dicts hold."""
    values = dict((*source.named_parameters(), *source.named_buffers()))
    for name, value in (*target.named_parameters(), *target.named_buffers()):
        if name in values and values[name].shape == value.shape:
            value.copy_(values[name])

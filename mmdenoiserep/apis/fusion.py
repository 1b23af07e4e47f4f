"""Fuses a checkpoint file, and verifies that the fused backbone computes what the denoised one does."""

from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..core import CheckpointError, FusedCheckpoint, Verification, verify_fusion
from ..core.files.atomic import check_output
from ..core.files.checkpoint import write_atomically
from ..core.files.content import open_checkpoint
from ..core.files.fused import fuse_content
from ..engine.backbone import denoised_backbones
from .errors import ConfigError
from .model import build_model, load_strictly


def fuse_file(
    source: str | Path,
    target: str | Path,
    *,
    cfg: Config | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> tuple[FusedCheckpoint, dict[str, Verification]]:
    """Folds the denoisers of a checkpoint file into its weights, and compares both in the models of a config.

    Args:
        source: Checkpoint of a training run with DenoiseRep.
        target: File to write; it loads into the config without denoising.
        cfg: Config of that run, to verify with; None compares nothing.
        overwrite: Whether the target may exist.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Returns:
        What was fused; how far fused and unfused backbones are apart on two random images, by name of the backbone.

    Raises:
        CheckpointError: The file can't be read, fused or written, does not fit the config, or the outputs differ.
        ConfigError: The config has no DenoiseRepBackbone.

    Example:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist_denoiserep.py')
        >>> torch.save(build_model(cfg).state_dict(), 'denoised.pth')
        >>> fused, differences = fuse_file('denoised.pth', 'fused.pth', cfg=cfg)
        >>> differences['backbone'].ok
        True
    """
    check_output(Path(target), overwrite, source=Path(source))
    content = open_checkpoint(source, allow_pickle)
    fused = fuse_content(content)
    differences = verify_weights(cfg, content.weights, fused.weights, str(source)) if cfg else {}
    write_atomically(dict(meta=fused.meta, state_dict=fused.weights), Path(target))
    return fused, differences


def verify_weights(
    cfg: Config, denoised: Mapping[str, Tensor], fused: Mapping[str, Tensor], source: str
) -> dict[str, Verification]:
    """Loads two state dicts into the models of a config and compares their backbones on two random images.

    What the state dicts do not hold (all but the LoRA weights, in those of a LoRA model) is the same in both models.

    Args:
        cfg: Config with DenoiseRepBackbone.
        denoised: State dict with denoisers.
        fused: State dict without them.
        source: Path of the checkpoint, for messages.

    Returns:
        How far the outputs are apart, by name of the backbone.

    Raises:
        CheckpointError: The names or shapes do not fit the config, a backbone did not run when it was converted, or a
            difference is beyond the tolerance.
        ConfigError: The config has no DenoiseRepBackbone.
        FusionError: There is nothing to compare in what a backbone returns.
    """
    model = build_model(cfg)
    if not any(denoised_backbones(model)):
        raise ConfigError(f'{cfg.filename} has no DenoiseRepBackbone; --verify needs the config of the training run')
    vanilla = build_model(cfg, denoised=False)
    _copy_values(model, vanilla)
    load_strictly(model, denoised, source, 'denoised')
    load_strictly(vanilla, fused, source, 'vanilla')
    differences = {}
    for name, backbone, record in denoised_backbones(model):
        dtype = next(backbone.parameters()).dtype
        images = torch.randn((2, *record.image_shape[1:]), generator=torch.Generator().manual_seed(0)).to(dtype)
        if reason := record.report.probe_failure:
            raise CheckpointError(
                f'{name} does not run on images of {tuple(images.shape[1:])} ({reason}); '
                'set image_size of DenoiseRepBackbone'
            )
        differences[name] = result = verify_fusion(backbone, vanilla.get_submodule(name), images)
        if not result.ok:
            raise CheckpointError(
                f'{source}: fused and unfused {name} differ beyond the tolerance ({result.worst}); nothing was written'
            )
    return differences


@torch.no_grad()
def _copy_values(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters and buffers that two models have under the same names, whatever their state dicts hold."""
    values = dict((*source.named_parameters(), *source.named_buffers()))
    for name, value in (*target.named_parameters(), *target.named_buffers()):
        if name in values and values[name].shape == value.shape:
            value.copy_(values[name])

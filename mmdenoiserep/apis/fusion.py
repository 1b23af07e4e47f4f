"""Fuses a checkpoint file and verifies that the fused and the denoised backbone have the same outputs."""

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
from ..core.method.record import find_records
from ..core.utils.randomness import random_images
from .errors import ConfigError, config_name
from .model import build_model, load_strictly


def fuse_file(
    source: str | Path,
    target: str | Path,
    *,
    cfg: Config | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> tuple[FusedCheckpoint, dict[str, Verification]]:
    """Folds the denoisers of a checkpoint file into its weights, and verifies the result.

    Args:
        source: Checkpoint of a training with DenoiseRep.
        target: File to write; it loads into the config without denoising.
        cfg: Config of the training, to verify with; None skips the verification.
        overwrite: Whether the target may exist.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Returns:
        The report of the fusion; the differences of :func:`verify_weights`, empty without a config.

    Raises:
        CheckpointError: The file can't be read, fused or written, does not fit the config, or the outputs differ.
        ConfigError: The config has no DenoiseRepBackbone.
        FusionError: The backbone returns no tensor that could be compared.

    Examples:
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
    """Loads a denoised and a fused state dict into the models of a config and compares the outputs of their backbones.

    The inputs are two random images. Parameters that the state dicts lack (those of LoRA models hold only the LoRA
    weights) are equal in both models.

    Args:
        cfg: Config with DenoiseRepBackbone.
        denoised: State dict with denoisers.
        fused: State dict without denoisers.
        source: Path of the checkpoint, for messages.

    Returns:
        The differences of the outputs by name of the backbone.

    Raises:
        CheckpointError: Names or shapes do not fit the config, a backbone does not run on images of its
            ``image_size``, or a difference exceeds the tolerance.
        ConfigError: The config has no DenoiseRepBackbone.
        FusionError: A backbone returns no tensor that could be compared.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist_denoiserep.py')
        >>> denoised = build_model(cfg).state_dict()
        >>> verify_weights(cfg, denoised, fuse_state_dict(denoised), 'denoised.pth')['backbone'].ok
        True
    """
    model = build_model(cfg)
    if not any(find_records(model)):
        raise ConfigError(
            f'{config_name(cfg)} has no DenoiseRepBackbone; the verification needs the config of the training run'
        )
    vanilla = build_model(cfg, denoised=False)
    _copy_values(model, vanilla)
    load_strictly(model, denoised, source, 'denoised')
    load_strictly(vanilla, fused, source, 'vanilla')
    differences = {}
    for name, backbone, record in find_records(model):
        images = random_images((2, *record.image_shape[1:])).to(next(backbone.parameters()).dtype)
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
    """Copies all parameters and buffers with the same name and shape, also those that a state dict leaves out."""
    values = dict((*source.named_parameters(), *source.named_buffers()))
    for name, value in (*target.named_parameters(), *target.named_buffers()):
        if name in values and values[name].shape == value.shape:
            value.copy_(values[name])

"""Builds the model of a config and loads a checkpoint strictly."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..core import CheckpointError, InputError, fuse_state_dict
from ..core.files.content import EXTRA_STATE, open_checkpoint
from ..core.fusing.fuse import denoiser_keys
from .arguments import one_of
from .backbones import find_backbones
from .config import set_default_scope, without_denoising
from .errors import ConfigError, config_at_fault, config_name, config_path


def build_model(cfg: Config, denoised: bool = True) -> nn.Module:
    """Builds the model of a config as mmengine's runner does, in eval mode, with random weights.

    Args:
        cfg: The config; it is not changed, though some models (DINO) write into the config they are built from.
        denoised: Whether to keep ``DenoiseRepBackbone``; otherwise the vanilla model is built.

    Raises:
        ConfigError: The config has no model, or the model can't be built.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> build_model(cfg)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    with config_at_fault(config_path(cfg)):
        if not cfg.get('model'):
            raise ConfigError(f'{config_name(cfg)} has no model')
        set_default_scope(cfg)
        model = deepcopy(cfg.model)
        if 'data_preprocessor' in cfg:
            model.setdefault('data_preprocessor', deepcopy(cfg.data_preprocessor))
        return MODELS.build(model if denoised else without_denoising(model)).eval()


def open_model(
    cfg: Config, checkpoint: str | Path, *, denoisers: str = 'fold', allow_pickle: bool = False
) -> tuple[nn.Module, dict]:
    """Builds the model of a config and loads a checkpoint into it.

    Args:
        cfg: The config.
        checkpoint: Path of the checkpoint.
        denoisers: ``'fold'`` builds the vanilla model and folds the denoisers of the checkpoint into its weights;
            ``'refuse'`` builds the vanilla model and refuses denoisers; ``'keep'`` builds the model as the config says,
            with zero denoisers if the checkpoint has none.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Returns:
        The model in eval mode; ``meta`` of the checkpoint as plain data, for a vanilla model with the config without
        denoising.

    Raises:
        CheckpointError: The checkpoint can't be read or does not fit the config, or its denoisers are refused.
        FusionError: The denoisers can't be folded.
        InputError: The model has no backbone.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> model, meta = open_model(cfg, 'vit.pth')
        >>> type(model).__name__
        'ImageClassifier'
    """
    one_of(('fold', 'refuse', 'keep'), denoisers=denoisers)
    content = open_checkpoint(checkpoint, allow_pickle)
    if denoisers != 'keep':
        content = content.without_denoising()
    state: Mapping[str, Tensor] = content.weights
    has_some = bool(denoiser_keys(state))
    if has_some and denoisers == 'refuse':
        raise CheckpointError(
            f'{checkpoint} has denoisers; fold them into the weights first: '
            f'tools/fuse_checkpoint.py {checkpoint} FUSED.pth'
        )
    model = build_model(cfg, denoisers == 'keep')
    find_backbones(model)
    if denoisers == 'keep':
        start = model.state_dict()
        state = state if has_some else state | {key: start[key] for key in denoiser_keys(start)}
    elif has_some:
        state = fuse_state_dict(state)
    load_strictly(model, state, checkpoint, 'denoised' if denoisers == 'keep' else 'vanilla')
    return model, content.meta


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path, kind: str) -> None:
    """Loads a state dict whose names and shapes match the model exactly.

    Args:
        model: The model.
        weights: The state dict.
        path: Path of the checkpoint, for messages.
        kind: ``'denoised'`` or ``'vanilla'``, for messages.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    known = named_values(model)
    expected = model.state_dict()  # a model with LoRA leaves out some of its parameters
    may_differ = ('num_batches_tracked', EXTRA_STATE)
    missing = [name for name in expected if name not in weights and not name.endswith(may_differ)]
    unknown = [name for name in weights if name not in expected and name not in known and not name.endswith(may_differ)]
    if missing or unknown:
        raise CheckpointError(
            f'{path} does not fit the {kind} model of the config, which {_describe(missing)}; '
            f'the file {_describe(unknown)}{_about_statistics(missing)}'
        )
    for name, value in weights.items():
        shape = getattr(expected.get(name, known.get(name)), 'shape', None)
        if shape != getattr(value, 'shape', None) and not name.endswith(may_differ):
            raise CheckpointError(
                f'{path} does not fit the {kind} model of the config: {name} is {tuple(getattr(value, "shape", ()))} '
                f'in the file and {tuple(shape or ())} in the model'
            )
    # names and shapes are compared above, because some models drop buffers while loading
    model.load_state_dict(weights, strict=False)


def named_values(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers of a model by name, shared ones under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _describe(names: Sequence[str]) -> str:
    if not names:
        return 'has nothing besides'
    return f'has {len(names)} tensors besides: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}'


def _about_statistics(missing: Sequence[str]) -> str:
    statistics = [name for name in missing if name.endswith(('running_mean', 'running_var'))]
    if not statistics:
        return ''
    return f'; {statistics[0]} is a statistic of a BatchNorm layer: take a file with the buffers of the model, too'


def to_device(model: nn.Module, device: str | None = None) -> nn.Module:
    """Moves a model to a device, by default to the GPU, or the CPU without one.

    Raises:
        InputError: The device can't be used.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return model.to(device)
    except Exception as error:  # the module or the driver of a device may be missing
        reason = str(error).split('\n')[0]
        raise InputError(f'the device {device} cannot be used ({reason})') from error

"""Builds any backbone of any OpenMMLab library with denoisers on its layers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ..core import DEFAULT_RANK, NoiseSchedule, apply_denoiserep
from ..core.method.probe import image_channels
from ..core.method.record import KEY, DenoiseRepRecord
from ..core.method.targets import Targets
from ..core.utils.randomness import random_images
from ..core.utils.tensors import tensors_in

CHANNELS = ('in_channels', 'in_chans', 'input_channels')
"""What backbones call the number of channels of their images."""


@MODELS.register_module()
def DenoiseRepBackbone(
    backbone: Mapping[str, Any],
    targets: Targets = 'all',
    exclude: str | Sequence[str] = (),
    rank: int | None = DEFAULT_RANK,
    denoiser_bias: bool | None = None,
    schedule: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] | None = None,
    pretrained: str | None = None,
) -> nn.Module:
    """Builds the inner backbone, gives its target layers denoisers and returns that same backbone.

    There is no wrapper at run time: every parameter keeps its name, so vanilla checkpoints, ``init_cfg``,
    ``frozen_stages`` and layer-wise learning rates work as before. The conversion is logged once as a table.

    Args:
        backbone: Config of the inner backbone, built in the default scope, or in the one that its ``_scope_`` or the
            prefix of its type (``mmdet.SwinTransformer``) names.
        targets: Which layers, see :func:`mmdenoiserep.apply_denoiserep`.
        exclude: Which of them to leave out, see :func:`mmdenoiserep.apply_denoiserep`.
        rank: Rank of the denoisers; None for full.
        denoiser_bias: Whether the denoisers have a bias; None gives one to every layer that can fold it exactly.
        schedule: Arguments of :class:`mmdenoiserep.NoiseSchedule`; None takes the official ones.
        image_size: Side or (height, width) of the dummy image for the dry run, in pixels; None takes ``img_size`` of
            the backbone, or 224. It has the ``in_channels`` (``in_chans``) of the backbone, else those that its first
            convolution takes (up to four), else three.
        pretrained: Handed to the inner backbone (mmseg's segmentors set it from their own ``pretrained``).

    Raises:
        KeyError: The inner type is in no registry in reach.
        ValueError: See :func:`mmdenoiserep.apply_denoiserep`; or the backbone has an attribute ``denoiserep``.
    """
    config = dict(backbone)
    if pretrained is not None:
        config['pretrained'] = pretrained
    module = _build(config)
    if hasattr(module, KEY):
        raise ValueError(f'{type(module).__qualname__} has an attribute {KEY} of its own; rename that')
    arguments = {name: p.default for name, p in inspect.signature(type(module)).parameters.items()} | config
    size = image_size or arguments.get('img_size') or 224
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((arguments[key] for key in CHANNELS if isinstance(arguments.get(key), int)), image_channels(module))
    shape = (1, channels, height, width)
    report = apply_denoiserep(
        module,
        targets,
        exclude,
        rank=rank,
        bias=denoiser_bias,
        schedule=NoiseSchedule(**schedule) if schedule else None,
        example_input=random_images(shape),
    )
    print_log(f'DenoiseRep on {type(module).__module__}.{type(module).__qualname__}:\n{report}', logger='current')
    module.denoiserep = DenoiseRepRecord(report, shape)  # type: ignore[assignment]
    module.register_forward_hook(guard_training)
    return module


def _build(config: dict[str, Any]) -> nn.Module:
    try:
        return MODELS.build(config)
    except KeyError as error:
        if not str(error.args[0]).startswith(f'{config.get("type")} is not in the'):
            raise  # it is about something inside the backbone
        scope = DefaultScope.get_current_instance()
        where = f'the default scope is {scope.scope_name}' if scope else 'no default scope is set'
        raise KeyError(
            f'DenoiseRepBackbone found no backbone {config.get("type")!r} ({where}); set default_scope in the config, '
            f'or name the library in the type, such as mmdet.{str(config.get("type")).split(".")[-1]}'
        ) from None


def guard_training(backbone: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook: makes the backward pass raise while nothing adds the loss of the denoisers.

    They would stay as they are, without a word. The forward pass stays possible, for a model may run in training mode
    for other purposes.
    """
    if backbone.training and torch.is_grad_enabled() and not backbone.denoiserep.has_loss:  # type: ignore[union-attr]
        for value in tensors_in(output):
            if value.requires_grad:
                value.register_hook(_refuse_backward)


def _refuse_backward(grad: torch.Tensor) -> None:
    raise RuntimeError(
        'a denoised backbone is being trained without the loss of its denoisers, which would stay as they are; '
        "add custom_hooks = [dict(type='DenoiseLossHook')] to the config"
    )

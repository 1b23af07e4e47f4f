"""Embedding layers with a denoiser on their input: ``y = W x' + b`` with ``x' = x - (B x + b~)``."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..utils.errors import InputError
from .correction import Correction
from .denoiser import Denoiser
from .fold import FusionError, fold_layer
from .loss import limit_curvature
from .sample import Sample
from .schedule import NoiseSchedule, ReverseStep

OFFICIAL_SCHEDULE = NoiseSchedule()

Layer = nn.Linear | nn.Conv2d
"""The layers that the method works on."""


class DenoiseLayer(nn.Module):
    """What :class:`DenoiseLinear` and :class:`DenoiseConv2d` share.

    Layer t of the cascade sees its input x as one step of a reverse diffusion,

        ``x' = c3 x - c1 (D x + d) = x - (B x + b~)``,   ``B = c1 D - (c3 - 1) I``,   ``b~ = c1 d``

    and stores B and b~: zero is exactly the vanilla layer in every dtype.

    Attributes:
        denoiser: The correction, see :class:`Denoiser`.
        timestep: t; the first executed layer of a model has the largest, the last one 1.
        schedule: The schedule that t refers to.
    """

    weight: Tensor
    bias: Any
    denoiser: Denoiser
    timestep: int
    schedule: NoiseSchedule
    vanilla_class: type[nn.Module]

    def extra_repr(self) -> str:
        """Adds the timestep to what the vanilla layer prints of itself."""
        return f'{super().extra_repr()}, timestep={self.timestep}'

    @property
    def reverse_step(self) -> ReverseStep:
        """The constants of this layer's timestep."""
        return self.schedule.reverse_step(self.timestep)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to the denoised input, in training and in evaluation alike.

        ``W (x - (B x + b~)) + b = (W - W B) x + (b - W b~)``: B is multiplied by the weight or by the input, whichever
        has fewer elements. It is a constant here: a label loss trains the layer through its denoiser, but never the
        denoiser.

        Raises:
            InputError: torch.fx traces the layer, which a branch on sizes does not allow.
        """
        if isinstance(input, torch.fx.Proxy):
            raise InputError(
                'a model with denoisers cannot be traced by torch.fx, nor trained with efficient_conv_bn_eval of '
                'mmengine, which traces it and computes convolutions without their denoisers: leave '
                'efficient_conv_bn_eval out of the config, and trace the fused model'
            )
        if input.numel() > self.weight.numel():
            return self.forward_plain(input, *self._fold())
        return self.forward_by_definition(input)

    def forward_by_definition(self, x: Tensor) -> Tensor:
        """Applies the layer to :meth:`correct`, whatever that costs."""
        return self.forward_plain(self.correct(x), self.weight, self.bias)

    def correct(self, x: Tensor) -> Tensor:
        """Returns the denoised input ``x' = x - (B x + b~)``, same shape as x; B and b~ are constants here."""
        return x - self._constants().apply(x, self._project, self._scale)

    def denoise_loss(self, x: Tensor, limit: float = 1.0) -> Tensor:
        """Returns the expected error of the noise prediction on an input, see :meth:`~.correction.Correction.loss`.

        Args:
            x: An input of the layer, of any shape that the layer accepts. It is detached.
            limit: The gradient is scaled down where the curvature is larger, see :func:`~.loss.limit_curvature`;
                ``math.inf`` gives the derivative itself.

        Returns:
            A scalar, float32 or, for float64 parameters, float64; autocast is off.
        """
        return self.denoise_loss_of([(Sample()(self, x), 1.0)], limit)

    def denoise_loss_of(self, parts: Sequence[tuple[Tensor, float]], limit: float = 1.0) -> Tensor:
        """Does the same for parts of inputs: vectors of :class:`~.sample.Sample`, (groups, C/g, n), and their share."""
        with torch.autocast(self.weight.device.type, enabled=False):
            dtype = _accurate(next(self.denoiser.parameters()).dtype)
            correction, step = self.denoiser.correction().to(dtype), self.reverse_step
            losses, curvatures = [], []
            for vectors, share in parts:
                vectors = vectors.detach().to(dtype)
                losses.append(correction.loss(vectors, step) * share)
                curvatures.append(correction.curvature(vectors, step) * share)
            return limit_curvature(torch.stack(losses).sum(), torch.stack(curvatures).sum(), limit)

    def fuse(self) -> nn.Module:
        """Returns the plain layer with the denoiser folded in, as ``timm.utils.reparameterize_model`` asks for it.

        Returns:
            A copy of the layer, of the class that it had before the conversion.

        Raises:
            FusionError: The layer was pruned or parametrised since, a value is not finite, or overflows the dtype of
                the weight.
        """
        values = self.folded('the layer')
        plain: Any = restore_layer(copy.deepcopy(self))
        forget_denoising(plain)
        with torch.no_grad():
            for key, value in values.items():
                plain.get_parameter(key).copy_(value)
        return plain

    def folded(self, name: str) -> dict[str, Tensor]:
        """Returns ``weight`` and, if there is one, ``bias`` of :meth:`fuse`; messages call the layer by the name."""
        parameters = dict(self.named_parameters(recurse=False))
        if is_parametrized(self) or 'weight' not in parameters:
            raise FusionError(
                f'the weight of {name} was pruned or parametrised after the conversion; make that '
                'permanent (torch.nn.utils.prune.remove, remove_parametrizations) and fuse then'
            )
        denoiser = dict(self.denoiser.named_parameters())
        weight, bias, _ = fold_layer(name, self.weight, parameters.get('bias'), denoiser)
        return dict(weight=weight) if bias is None else dict(weight=weight, bias=bias)

    def _constants(self) -> Correction:
        return Correction.of({name: p.detach() for name, p in self.denoiser.named_parameters()})

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        """Returns the fused weight and bias, computed in float32 or float64, in the dtype of the weight."""
        with torch.autocast(self.weight.device.type, enabled=False):
            dtype = _accurate(self.weight.dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            weight, bias = self._constants().to(dtype).fold(self.weight.to(dtype), bias)
        return weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype)

    def forward_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the vanilla layer with some weight and bias."""
        raise NotImplementedError

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Applies a block-diagonal matrix (groups, out/g, in/g) to the channels of x."""
        raise NotImplementedError

    def _scale(self, x: Tensor, scale: Tensor) -> Tensor:
        """Multiplies the channels of x by one number a group, scale (groups,)."""
        raise NotImplementedError

    def _attach(self, timestep: int, schedule: NoiseSchedule | None, rank: int | None, bias: bool | None) -> None:
        exact = can_fuse_denoiser_bias(self)  # type: ignore[arg-type]
        if bias and not exact:
            raise ValueError(
                'a denoiser bias can only be fused into a layer that has a bias and pads no zeros; '
                'leave denoiser_bias at None to have one wherever that is exact'
            )
        self.schedule = schedule or OFFICIAL_SCHEDULE
        self.timestep = timestep
        _ = self.reverse_step  # refuse a timestep outside the schedule now
        channels, groups = input_channels(self)  # type: ignore[arg-type]
        with_bias = exact if bias is None else bias
        self.denoiser = Denoiser(channels, groups, rank, with_bias, self.weight.device, self.weight.dtype)
        self.denoiser.requires_grad_(self.weight.requires_grad)


class DenoiseLinear(DenoiseLayer, nn.Linear):
    """``nn.Linear`` with a denoiser on its input; adds only ``denoiser.*`` to the state dict.

    Args:
        in_features: C.
        out_features: Size of the output.
        bias: Whether the layer has a bias.
        timestep: t of this layer in the reverse diffusion.
        schedule: Defaults to the official :class:`NoiseSchedule`.
        rank: Rank of the denoiser, None for full.
        denoiser_bias: None has one wherever it fuses exactly, which needs ``bias=True``.
        device: Device of all parameters.
        dtype: Dtype of all parameters.

    Shape:
        Input (..., C), output (..., out_features).

    Raises:
        ValueError: A denoiser bias that can't be fused exactly, a rank below 1, a timestep outside the schedule.
    """

    vanilla_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        timestep: int = 1,
        schedule: NoiseSchedule | None = None,
        rank: int | None = None,
        denoiser_bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._attach(timestep, schedule, rank, denoiser_bias)

    def forward_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies ``nn.Linear`` with some weight and bias."""
        return F.linear(x, weight, bias)

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, matrix[0], bias)

    def _scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


class DenoiseConv2d(DenoiseLayer, nn.Conv2d):
    """``nn.Conv2d`` with a 1x1 denoiser on its input; adds only ``denoiser.*`` to the state dict.

    The denoiser has the groups of the convolution: one block a group, a diagonal for a depthwise one.

    Args:
        *args: As ``nn.Conv2d``.
        timestep: t of this layer in the reverse diffusion.
        schedule: Defaults to the official :class:`NoiseSchedule`.
        rank: Rank of each block, None for full.
        denoiser_bias: None has one wherever it fuses exactly: the layer has a bias and pads no zeros.
        **kwargs: As ``nn.Conv2d``.

    Shape:
        Input (B, C, H, W) or (C, H, W), output as ``nn.Conv2d``.

    Raises:
        ValueError: A denoiser bias that can't be fused exactly, a rank below 1, a timestep outside the schedule.
    """

    vanilla_class = nn.Conv2d

    def __init__(
        self,
        *args: Any,
        timestep: int = 1,
        schedule: NoiseSchedule | None = None,
        rank: int | None = None,
        denoiser_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._attach(timestep, schedule, rank, denoiser_bias)

    def forward_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies ``nn.Conv2d`` with some weight and bias."""
        return super()._conv_forward(x, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies another weight and bias to the denoised input: mmcv's ``efficient_conv_bn_eval`` scales them."""
        return self.forward_plain(self.correct(input), weight, bias)

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, matrix.flatten(0, 1)[..., None, None], bias, groups=matrix.shape[0])

    def _scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.repeat_interleave(self.weight.shape[1])[:, None, None]


DENOISE_CLASSES: dict[type[nn.Module], type[DenoiseLayer]] = {nn.Linear: DenoiseLinear, nn.Conv2d: DenoiseConv2d}


def convert_layer(
    layer: nn.Module, timestep: int, schedule: NoiseSchedule | None, rank: int | None, bias: bool | None
) -> DenoiseLayer:
    """Turns an ``nn.Linear`` or ``nn.Conv2d`` into its denoised class, in place, and returns it.

    The object stays the same one: whoever holds it (several parents, a list, an optimizer its parameters, a forward
    hook) needs no change. :func:`restore_layer` is the way back.
    """
    vanilla = type(layer)
    denoised = next(denoised for base, denoised in DENOISE_CLASSES.items() if issubclass(vanilla, base))
    layer.__class__ = denoised  # type: ignore[assignment]
    assert isinstance(layer, DenoiseLayer)
    layer.vanilla_class = vanilla
    try:
        layer._attach(timestep, schedule, rank, bias)
    except BaseException:
        restore_layer(layer)
        raise
    return layer


def restore_layer(layer: DenoiseLayer) -> nn.Module:
    """Turns a denoised layer back into the plain layer it was, in place and without folding anything; returns it."""
    vanilla = layer.vanilla_class
    layer._modules.pop('denoiser', None)
    for name in ('timestep', 'schedule', 'vanilla_class'):
        layer.__dict__.pop(name, None)
    layer.__class__ = vanilla  # type: ignore[assignment]
    return layer


def forget_denoising(module: nn.Module) -> None:
    """Removes what this package hung on a module: its hooks, which listen to denoised layers, and its record."""
    package = f'{__name__.partition(".")[0]}.'
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if str(getattr(hook, '__module__', '')).startswith(package)]:
            del hooks[key]
    if type(module.__dict__.get('denoiserep')).__module__.startswith(package):
        del module.__dict__['denoiserep']


def reserved_names(layer: nn.Module) -> set[str]:
    """Returns what a denoised layer defines beside the plain one: names that the plain layer must not use itself."""
    base, denoised = next((b, d) for b, d in DENOISE_CLASSES.items() if isinstance(layer, b))
    names = {name for kind in (DenoiseLayer, denoised) for name in (*vars(kind), *kind.__annotations__)}
    return names - set(dir(base)) - {'weight', 'bias'}


def input_channels(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Returns (input channels, groups) of a layer, those of its weight; a Linear layer has one group."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return layer.weight.shape[1] * groups, groups


def can_fuse_denoiser_bias(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a bias of the denoiser folds exactly into the bias of the layer.

    The vanilla layer must have a bias to fold it into, and nothing may be padded with zeros: at the border the fused
    bias would count kernel taps on which the padding, not the denoised input, stands.
    """
    if layer.bias is None:
        return False
    if isinstance(layer, nn.Linear) or layer.padding_mode != 'zeros':
        return True
    # 'same' and 'valid' are worked out by the layer; a tuple is what the forward reads, and models may change it
    padding = layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else layer.padding
    return not any(padding)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

"""Linear layers and convolutions with a denoiser on their input: ``y = W x' + b``, ``x' = x - (B x + b~)``."""

import copy
from collections.abc import Mapping, Sequence
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
from .loss import Part, losses_of
from .sample import Sample
from .schedule import NoiseSchedule, ReverseStep

OFFICIAL_SCHEDULE = NoiseSchedule()

Layer = nn.Linear | nn.Conv2d
"""The layers that can get a denoiser."""


class DenoiseLayer(nn.Module):
    """Base class of :class:`DenoiseLinear` and :class:`DenoiseConv2d`.

    The layer with the timestep t applies one reverse step of the diffusion to its input x, with a linear prediction
    ``D x + d`` of the noise:

        ``x' = c3 x - c1 (D x + d) = x - (B x + b~)``,   ``B = c1 D - (c3 - 1) I``,   ``b~ = c1 d``

    It stores B and b~, so that zeros give exactly the vanilla layer in every dtype.

    Attributes:
        denoiser: The parameters of B and b~, see :class:`Denoiser`.
        timestep: t; the first executed layer of a model has the largest timestep, the last one has 1.
        schedule: The noise schedule.
    """

    weight: Tensor
    bias: Any
    denoiser: Denoiser
    timestep: int
    schedule: NoiseSchedule
    vanilla_class: type[nn.Module]
    _channel_shape: tuple[int, ...]  # (C,) numbers are reshaped to it, to multiply features

    def extra_repr(self) -> str:
        """Adds the timestep to the representation of the vanilla layer."""
        return f'{super().extra_repr()}, timestep={self.timestep}'

    @property
    def reverse_step(self) -> ReverseStep:
        """The constants of this layer's timestep."""
        return self.schedule.reverse_step(self.timestep)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to the denoised input, in training and in eval mode.

        ``W (x - (B x + b~)) + b = (W - W B) x + (b - W b~)``: B multiplies the weight or the input, whichever has fewer
        elements. B and b~ are constants here: the model's own loss trains the layer, but not the denoiser.

        Args:
            input: Features, as the vanilla layer takes them.

        Raises:
            InputError: torch.fx traces the layer; it can't follow the branch on sizes.
        """
        if isinstance(input, torch.fx.Proxy):
            raise InputError(
                'a model with denoisers cannot be traced by torch.fx, nor trained with efficient_conv_bn_eval of '
                'mmengine, which traces it and computes convolutions without their denoisers: leave '
                'efficient_conv_bn_eval out of the config, and trace the fused model'
            )
        if input.numel() > self.weight.numel():
            return self.forward_plain(input, *self._fused())
        return self.forward_by_definition(input)

    def forward_by_definition(self, x: Tensor) -> Tensor:
        """Applies the layer to ``correct(x)``, also where fused weights are cheaper."""
        return self.forward_plain(self.correct(x), self.weight, self.bias)

    def correct(self, x: Tensor) -> Tensor:
        """Returns the denoised input ``x' = x - (B x + b~)``, of the shape of x; B and b~ are constants here."""
        return x - self._constants().apply(x, self._project, self._channel_shape)

    def denoise_loss(self, x: Tensor, limit: float = 1.0) -> Tensor:
        """Returns the expected error of the predicted noise on an input, see :meth:`~.correction.Correction.losses`.

        Args:
            x: An input of the layer, of any shape that the layer accepts. It is detached.
            limit: Largest curvature, above which the gradient is scaled down, see :func:`~.loss.limit_curvature`;
                ``math.inf`` never scales it.

        Returns:
            A scalar, float64 for float64 parameters and float32 otherwise, also under autocast.
        """
        return self.denoise_loss_of([(Sample()(self, x), 1.0)], limit)

    def denoise_loss_of(self, parts: Sequence[tuple[Tensor, float]], limit: float = 1.0) -> Tensor:
        """Returns the weighted sum of :meth:`denoise_loss` of several inputs.

        Args:
            parts: Vectors of each input, (groups, C/g, n), see :class:`~.sample.Sample`, and the weight of its loss.
            limit: See :meth:`denoise_loss`.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            return losses_of(self.loss_parts(parts), 1, limit)[0]

    def loss_parts(self, calls: Sequence[tuple[Tensor, float]], number: int = 0) -> list[Part]:
        """Returns the calls of this layer for :func:`~.loss.losses_of`, in float64 or float32.

        Args:
            calls: See :meth:`denoise_loss_of`.
            number: Number of this layer.
        """
        dtype = torch.promote_types(next(self.denoiser.parameters()).dtype, torch.float32)
        correction, step = self.denoiser.correction().to(dtype), self.reverse_step
        return [Part(number, correction, step, vectors.detach().to(dtype), share) for vectors, share in calls]

    def fuse(self) -> nn.Module:
        """Returns a copy of the layer with the denoiser folded into its weight, of the class before the conversion.

        ``timm.utils.reparameterize_model`` calls this method.

        Raises:
            FusionError: The layer was pruned or parametrised after the conversion, or a value is not finite or
                overflows the dtype of the weight.
        """
        parameters = self.fused_parameters('the layer')
        return make_vanilla(copy.deepcopy(self), parameters)

    def fused_parameters(self, name: str) -> dict[str, Tensor]:
        """Returns ``weight`` and ``bias``, where the layer has one, of :meth:`fuse`; ``name`` is for messages."""
        parameters = dict(self.named_parameters(recurse=False))
        if is_parametrized(self) or 'weight' not in parameters:
            raise FusionError(
                f'the weight of {name} was pruned or parametrised after the conversion; make that '
                'permanent (torch.nn.utils.prune.remove, remove_parametrizations) before fusing'
            )
        denoiser = dict(self.denoiser.named_parameters())
        weight, bias, _ = fold_layer(name, self.weight, parameters.get('bias'), denoiser)
        return dict(weight=weight) if bias is None else dict(weight=weight, bias=bias)

    def _constants(self) -> Correction:
        """Returns the correction without gradients."""
        return Correction.of({name: p.detach() for name, p in self.denoiser.named_parameters()})

    def _fused(self) -> tuple[Tensor, Tensor | None]:
        """Returns the fused weight and bias, differentiable; computed in float32 or float64."""
        with torch.autocast(self.weight.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(dtype)
            weight, bias = self._constants().to(dtype).fold(self.weight.to(dtype), bias)
        return weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype)

    def forward_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the vanilla layer with the given weight and bias."""
        raise NotImplementedError

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Applies a block-diagonal matrix, (groups, out/g, in/g), and a bias to the channels of x."""
        raise NotImplementedError

    def _add_denoiser(self, timestep: int, schedule: NoiseSchedule | None, rank: int | None, bias: bool | None) -> None:
        exact = can_fuse_denoiser_bias(self)  # type: ignore[arg-type]
        if bias and not exact:
            raise ValueError(
                'a denoiser bias can only be fused into a layer that has a bias and pads no zeros; '
                'leave denoiser_bias at None to have one wherever that is exact'
            )
        self.schedule = schedule or OFFICIAL_SCHEDULE
        self.timestep = timestep
        _ = self.reverse_step  # raises for a timestep outside the schedule
        channels, groups = input_channels(self)  # type: ignore[arg-type]
        with_bias = exact if bias is None else bias
        self.denoiser = Denoiser(channels, groups, rank, with_bias, self.weight.device, self.weight.dtype)
        self.denoiser.requires_grad_(self.weight.requires_grad)


class DenoiseLinear(DenoiseLayer, nn.Linear):
    """``nn.Linear`` with a denoiser on its input; adds only ``denoiser.*`` to the state dict.

    Args:
        in_features: C.
        out_features: Output channels.
        bias: Whether the layer has a bias.
        timestep: t of this layer.
        schedule: The noise schedule; None takes the default :class:`NoiseSchedule`.
        rank: Rank of the denoiser; None for full rank.
        denoiser_bias: Whether the denoiser has a bias, which needs ``bias=True``; None gives it one where possible.
        device: Device of all parameters.
        dtype: Dtype of all parameters.

    Shape:
        Input (..., C), output (..., out_features).

    Raises:
        ValueError: The denoiser bias can't be fused exactly, the rank is below 1, or the timestep is outside the
            schedule.
    """

    vanilla_class = nn.Linear
    _channel_shape = (-1,)

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
        self._add_denoiser(timestep, schedule, rank, denoiser_bias)

    def forward_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies ``nn.Linear`` with the given weight and bias."""
        return F.linear(x, weight, bias)

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, matrix[0], bias)


class DenoiseConv2d(DenoiseLayer, nn.Conv2d):
    """``nn.Conv2d`` with a 1x1 denoiser on its input; adds only ``denoiser.*`` to the state dict.

    The denoiser has the groups of the convolution: one block for each group, a diagonal for a depthwise convolution.

    Args:
        *args: Positional arguments of ``nn.Conv2d``.
        timestep: t of this layer.
        schedule: The noise schedule; None takes the default :class:`NoiseSchedule`.
        rank: Rank of each block; None for full rank.
        denoiser_bias: Whether the denoiser has a bias, which needs a layer with a bias and without zero padding; None
            gives it one where possible.
        **kwargs: Keyword arguments of ``nn.Conv2d``.

    Shape:
        Input (B, C, H, W) or (C, H, W), output as from ``nn.Conv2d``.

    Raises:
        ValueError: The denoiser bias can't be fused exactly, the rank is below 1, or the timestep is outside the
            schedule.
    """

    vanilla_class = nn.Conv2d
    _channel_shape = (-1, 1, 1)

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
        self._add_denoiser(timestep, schedule, rank, denoiser_bias)

    def forward_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies ``nn.Conv2d`` with the given weight and bias."""
        return super()._conv_forward(x, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the given weight and bias, which mmcv's ``efficient_conv_bn_eval`` scales, to the denoised input."""
        return self.forward_plain(self.correct(input), weight, bias)

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        kernel = matrix.flatten(0, 1)[..., None, None]  # (groups * out/g, in/g, 1, 1)
        return F.conv2d(x, kernel, bias, groups=matrix.shape[0])


DENOISE_CLASSES: dict[type[nn.Module], type[DenoiseLayer]] = {nn.Linear: DenoiseLinear, nn.Conv2d: DenoiseConv2d}


def convert_layer(
    layer: nn.Module, timestep: int, schedule: NoiseSchedule | None, rank: int | None, bias: bool | None
) -> DenoiseLayer:
    """Turns an ``nn.Linear`` or ``nn.Conv2d`` into its denoised class, in place, and returns it.

    The object and its parameters stay the same, so parent modules, optimizers and hooks keep valid references. For the
    arguments see :class:`DenoiseLinear`; ``bias`` is its ``denoiser_bias``. :func:`restore_layer` is the inverse.

    Raises:
        ValueError: See :class:`DenoiseLinear`; the layer is then unchanged.
    """
    vanilla = type(layer)
    denoised = next(denoised for base, denoised in DENOISE_CLASSES.items() if issubclass(vanilla, base))
    layer.__class__ = denoised  # type: ignore[assignment]
    assert isinstance(layer, DenoiseLayer)
    layer.vanilla_class = vanilla
    try:
        layer._add_denoiser(timestep, schedule, rank, bias)
    except BaseException:
        restore_layer(layer)
        raise
    return layer


def restore_layer(layer: DenoiseLayer) -> nn.Module:
    """Turns a denoised layer back into its vanilla class, in place, and returns it; the denoiser is dropped."""
    vanilla = layer.vanilla_class
    layer._modules.pop('denoiser', None)
    for name in ('timestep', 'schedule', 'vanilla_class'):
        layer.__dict__.pop(name, None)
    layer.__class__ = vanilla  # type: ignore[assignment]
    return layer


def make_vanilla(layer: DenoiseLayer, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Turns a denoised layer into its vanilla class with the given parameters, in place, and returns it."""
    vanilla = restore_layer(layer)
    forget_denoising(vanilla)
    with torch.no_grad():
        for name, value in parameters.items():
            vanilla.get_parameter(name).copy_(value)
    return vanilla


def forget_denoising(module: nn.Module) -> None:
    """Removes what this package hung on a module: its hooks, which listen to denoised layers, and its record."""
    package = f'{__name__.partition(".")[0]}.'
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            function = getattr(hook, 'func', hook)  # of a partial
            if str(getattr(function, '__module__', '')).startswith(package):
                del hooks[key]
    if type(module.__dict__.get('denoiserep')).__module__.startswith(package):
        del module.__dict__['denoiserep']


def find_denoise_layers(module: nn.Module) -> dict[str, DenoiseLayer]:
    """Returns the denoised layers of a model by name, in the order of registration."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, DenoiseLayer)}


def reserved_names(layer: nn.Module) -> set[str]:
    """Returns the attributes that the denoised class adds to the vanilla class of a layer."""
    base, denoised = next((b, d) for b, d in DENOISE_CLASSES.items() if isinstance(layer, b))
    names = {name for kind in (DenoiseLayer, denoised) for name in (*vars(kind), *kind.__annotations__)}
    return names - set(dir(base)) - {'weight', 'bias'}


def input_channels(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Returns the input channels, by the shape of the weight, and the groups of a layer; a Linear layer has one."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return layer.weight.shape[1] * groups, groups


def can_fuse_denoiser_bias(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a bias of the denoiser folds exactly into the bias of the layer.

    The layer must have a bias and no zero padding: near the border of the image, some kernel taps of an output multiply
    padding, to which the denoiser adds no bias.
    """
    if layer.bias is None:
        return False
    if isinstance(layer, nn.Linear) or layer.padding_mode != 'zeros':
        return True
    # the forward reads `padding` if it is a tuple, which models may change, and else the sizes that 'same' stands for
    padding = layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else layer.padding
    return not any(padding)

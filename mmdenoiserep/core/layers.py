"""Embedding layers with a denoiser on their input: ``y = W x' + b`` with ``x' = x - (B x + b~)``."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import NoiseSchedule, ReverseStep

OFFICIAL_SCHEDULE = NoiseSchedule()


class Denoiser(nn.Module):
    """The correction ``B x + b~`` of one layer, held as raw parameters that start at zero.

    Full:     ``B = weight``             weight (groups, C/g, C/g)
    Low rank: ``B = scale I + up down``  scale (groups,), up (groups, C/g, rank), down (groups, rank, C/g)

    B is block-diagonal with one block a group. Raw parameters instead of an ``nn.Linear``, because backbones
    re-initialise every ``nn.Linear`` they find; no buffers, because hooks average and synchronise them.

    Args:
        channels: C, the input channels of the layer.
        groups: The groups of the layer, which must divide C.
        rank: Rank of ``up down``; None or at least C/g stores the full B.
        bias: Whether there is a ``b~``, shape (C,).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        rank: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f'the rank of a denoiser must be a number from 1 (or None for full rank), got {rank!r}')
        size = channels // groups

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        if rank is None or rank >= size:
            self.weight = zeros(groups, size, size)
        else:
            self.scale = zeros(groups)
            self.up = zeros(groups, size, rank)
            # With up = 0 the start is exactly B = 0; down must not be zero too, or neither would get a gradient.
            # B is of the order of c1, about 2e-3: down starts near its square root, so one learning rate suits both.
            # A generator of its own: converting a model leaves the random numbers of the training run as they were.
            noise = torch.randn(groups, rank, size, generator=torch.Generator().manual_seed(0)) * (0.05 / size**0.5)
            self.down = nn.Parameter(noise.to(device=device, dtype=dtype or self.up.dtype))
        self.bias = zeros(channels) if bias else None

    def matrix(self) -> Tensor:
        """Returns B, shape (groups, C/g, C/g), differentiable."""
        return correction_matrix(dict(self.named_parameters()))


def correction_matrix(parameters: Mapping[str, Tensor]) -> Tensor:
    """Assembles B, shape (groups, C/g, C/g), from the parameters of a full or low-rank :class:`Denoiser`."""
    if 'weight' in parameters:
        return parameters['weight']
    low_rank = parameters['up'] @ parameters['down']
    identity = torch.eye(low_rank.shape[-1], device=low_rank.device, dtype=low_rank.dtype)
    return parameters['scale'][:, None, None] * identity + low_rank


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

    def correct(self, x: Tensor) -> Tensor:
        """Returns the denoised input ``x' = x - (B x + b~)``, same shape as x.

        B and b~ are constants here: a label loss trains the layer through its denoiser, but never the denoiser.
        """
        return x - self._correction(x, {name: p.detach() for name, p in self.denoiser.named_parameters()})

    def denoise_loss(self, x: Tensor) -> Tensor:
        """Returns the expected error of the noise prediction, with the noise integrated out.

            ``L = E_eps |eps - (D x_t + d)|^2 / C,   x_t = sqrt(abar) x + sqrt(1 - abar) eps``
            ``  = ( |sqrt(abar) D x + d|^2 + |I - sqrt(1 - abar) D|_F^2 ) / C``, averaged over tokens

        with ``D = (B + (c3 - 1) I) / c1`` and ``d = b~ / c1``: no sampling, so no variance. x is detached, and
        autocast is off: half precision computes in float32.

        Args:
            x: An input of the layer, of any shape that the layer accepts. Without any token the loss is 0.

        Returns:
            A scalar, float32 or, for float64 inputs and parameters, float64.
        """
        step = self.reverse_step
        with torch.autocast(x.device.type, enabled=False):
            parameters = {name: p.to(_accurate(p.dtype)) for name, p in self.denoiser.named_parameters()}
            matrix = correction_matrix(parameters)
            if x.numel() == 0:
                return sum((p.sum() for p in parameters.values()), matrix.new_zeros(())) * 0
            x = x.detach().to(matrix.dtype) * step.signal
            prediction = (self._correction(x, parameters) + step.c3_minus_1 * x) / step.c1
            identity = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
            residual = identity - step.noise / step.c1 * (matrix + step.c3_minus_1 * identity)
            channels = matrix.shape[0] * matrix.shape[1]
            return prediction.square().mean() + residual.square().sum() / channels

    def _correction(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns ``B x + b~``, without building B where it is of low rank."""
        bias = parameters.get('bias')
        if 'weight' in parameters:
            return self._project(x, parameters['weight'], bias)
        low_rank = self._project(self._project(x, parameters['down'], None), parameters['up'], bias)
        return self._scale(x, parameters['scale']) + low_rank

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

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to the denoised input, in training and in evaluation alike."""
        return nn.Linear.forward(self, self.correct(x))

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
        *args,
        timestep: int = 1,
        schedule: NoiseSchedule | None = None,
        rank: int | None = None,
        denoiser_bias: bool | None = None,
        **kwargs,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._attach(timestep, schedule, rank, denoiser_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to the denoised input, in training and in evaluation alike."""
        return nn.Conv2d.forward(self, self.correct(x))

    def _project(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, matrix.flatten(0, 1)[..., None, None], bias, groups=matrix.shape[0])

    def _scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.repeat_interleave(self.in_channels // self.groups)[:, None, None]


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


def restore_layer(layer: DenoiseLayer) -> None:
    """Turns a denoised layer back into the plain layer it was, in place and without folding anything."""
    vanilla = layer.vanilla_class
    layer._modules.pop('denoiser', None)
    for name in ('timestep', 'schedule', 'vanilla_class'):
        layer.__dict__.pop(name, None)
    layer.__class__ = vanilla  # type: ignore[assignment]


def input_channels(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Returns (input channels, groups) of a layer; a Linear layer has one group."""
    return (layer.in_features, 1) if isinstance(layer, nn.Linear) else (layer.in_channels, layer.groups)


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

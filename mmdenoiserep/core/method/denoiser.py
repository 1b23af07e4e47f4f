"""The linear denoiser of one layer: the parameters of its correction."""

import torch
from torch import Tensor, nn

from .correction import Correction

DEFAULT_RANK = 16
"""Rank of the denoisers that a converted model gets; docs/speed.md has the evidence."""


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
            noise = torch.randn(groups, rank, size, generator=torch.Generator().manual_seed(0), device='cpu')
            noise *= 0.05 / size**0.5
            self.down = nn.Parameter(noise.to(device=device, dtype=dtype or self.up.dtype))
        self.bias = zeros(channels) if bias else None

    def correction(self) -> Correction:
        """Returns ``B x + b~`` with these parameters, which get its gradients."""
        return Correction.of(dict(self.named_parameters()))

    def matrix(self) -> Tensor:
        """Returns B, shape (groups, C/g, C/g), differentiable."""
        return self.correction().matrix()

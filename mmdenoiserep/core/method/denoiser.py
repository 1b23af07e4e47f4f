"""The module that holds the parameters of a layer's correction."""

import torch
from torch import Tensor, nn

from .correction import Correction

DEFAULT_RANK = 16
"""Rank of the denoisers that a converted model gets; docs/speed.md has the evidence."""


class Denoiser(nn.Module):
    """The linear denoiser of one layer: the parameters of its correction ``B x + b~``, which is zero at the start.

        full rank:  ``B = weight``             weight (groups, C/g, C/g)
        low rank:   ``B = scale I + up down``  scale (groups,), up (groups, C/g, rank), down (groups, rank, C/g)

    B is block-diagonal, with one block for each group; b~ is ``bias``, (C,). The parameters are no ``nn.Linear``,
    which backbones would re-initialise, and no buffers, which hooks would average and synchronise.

    Args:
        channels: C, the input channels of the layer.
        groups: The groups of the layer, which must divide C.
        rank: Rank of ``up down``; None, or a rank of at least C/g, stores the full B.
        bias: Whether to have b~.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: The rank is no integer of at least 1.
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
            # B = 0 because up = 0. If down were zero too, neither would get a gradient. Trained, B is of the order of
            # c1, about 2e-3: down starts near its square root, so that one learning rate suits both factors.
            # The own generator keeps the conversion from changing the random numbers of the training.
            noise = torch.randn(groups, rank, size, generator=torch.Generator().manual_seed(0), device='cpu')
            noise *= 0.05 / size**0.5
            self.down = nn.Parameter(noise.to(device=device, dtype=dtype or self.up.dtype))
        self.bias = zeros(channels) if bias else None

    def correction(self) -> Correction:
        """Returns the correction with these parameters, differentiable."""
        return Correction.of(dict(self.named_parameters()))

    def matrix(self) -> Tensor:
        """Returns B, (groups, C/g, C/g), differentiable."""
        return self.correction().matrix()

"""Samples the channel vectors (tokens, pixels) of features."""

import torch
from torch import Tensor, nn


class Sample:
    """Reshapes the features of a layer to channel vectors, (groups, C/g, n), and samples some of them uniformly.

    The mean of a function over the sample is an unbiased estimate of its mean over all vectors.

    Args:
        every: Samples one vector in ``every``.
        most: Largest size of a sample; a convolution samples equally many vectors of each image, which may round the
            size up. None sets no limit.
        seed: Seed of the sampler's own generator.

    Raises:
        ValueError: ``every`` is less than 1.
    """

    def __init__(self, every: int = 1, most: int | None = None, seed: int = 0) -> None:
        if every < 1:
            raise ValueError(f'every must be 1 or more, got {every}')
        self.every = every
        self.most = most
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns sampled vectors, (groups, C/g, n), of inputs or outputs of a layer.

        Args:
            layer: An ``nn.Linear`` or ``nn.Conv2d``.
            x: Features, (..., C) of a Linear layer, (B, C, H, W) or (C, H, W) of a convolution.
        """
        if isinstance(layer, nn.Conv2d):
            x = x.flatten(-2).reshape(-1, x.shape[-3], x.shape[-2] * x.shape[-1])  # (B, C, H * W)
            chosen = self._draw(len(x), x.shape[-1])
            if chosen is not None:  # different pixels in each image
                x = x.gather(2, chosen[:, None].to(x.device).expand(-1, x.shape[1], -1))  # (B, C, n / B)
            return x.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (groups, C/g, n)
        x = x.flatten(0, -2) if x.dim() > 1 else x[None]  # (tokens, C)
        chosen = self._draw(1, len(x))
        if chosen is not None:
            x = x.index_select(0, chosen[0].to(x.device))  # (n, C)
        return x.mT[None]  # (1, C, n)

    def _draw(self, rows: int, length: int) -> Tensor | None:
        """Returns random indices below ``length``, with replacement, (rows, number); None stands for all."""
        number = -(-length // self.every)
        if self.most is not None:
            number = min(number, -(-self.most // max(rows, 1)))
        if number == length:
            return None
        return torch.randint(length, (rows, number), generator=self.generator, device='cpu')

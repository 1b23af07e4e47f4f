"""Draws a random part of the vectors (tokens, pixels) that a layer takes or gives."""

import torch
from torch import Tensor, nn


class Sample:
    """Lays out a batch as vectors of channels, (groups, C/g, n), or a random part of them.

    Every vector is as likely as any other, so the mean of a function over the part has the mean over all as its
    expectation.

    Args:
        most: Takes at most about so many vectors of a batch (the same number of each image); None takes any number.
        seed: The draws start from it; no other random number is touched.
    """

    def __init__(self, most: int | None = None, seed: int = 0) -> None:
        self.most = most
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, layer: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
        """Returns vectors of what a layer takes or gives, one in ``stride`` of them.

        Args:
            layer: The layer.
            x: (..., C); of a convolution (B, C, H, W) or (C, H, W).
            stride: 1 takes all, where ``most`` allows.
        """
        if isinstance(layer, nn.Conv2d):
            x = x.flatten(-2).reshape(-1, x.shape[-3], x.shape[-2] * x.shape[-1])  # (B, C, H * W)
            places = self.draw(len(x), x.shape[-1], stride)
            if places is not None:  # other pixels of every image, for a place in the image is no random sample
                x = x.gather(2, places[:, None].to(x.device).expand(-1, x.shape[1], -1))
            return x.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (groups, C/g, B * n)
        x = x.flatten(0, -2) if x.dim() > 1 else x[None]  # (n, C)
        places = self.draw(1, len(x), stride)
        if places is not None:
            x = x.index_select(0, places[0].to(x.device))
        return x.mT[None]  # (1, C, n)

    def draw(self, rows: int, length: int, stride: int) -> Tensor | None:
        """Returns places among ``length``, another random choice in each row; one may come twice. None takes all."""
        number = -(-length // stride)
        if self.most is not None:
            number = min(number, -(-self.most // max(rows, 1)))
        return (
            torch.randint(length, (rows, number), generator=self.generator, device='cpu') if number < length else None
        )

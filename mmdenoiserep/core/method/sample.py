"""Samples the channel vectors (tokens, pixels) of features."""

import torch
from torch import Tensor, nn


class Sample:
    """Reshapes the features of a layer to channel vectors, (groups, C/g, n), and samples some of them uniformly.

    The mean of a function over the sample is an unbiased estimate of its mean over all vectors.

    Args:
        most: Largest size of a sample; a convolution samples equally many vectors of each image, which may round the
            size up. None sets no limit.
        seed: Seed of the sampler's own generator.
        images: Images in the batch. A Linear layer samples equally many vectors of each, where their number divides
            that of the vectors.
    """

    def __init__(self, most: int | None = None, seed: int = 0, images: int = 1) -> None:
        self.most = most
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, layer: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
        """Returns sampled vectors, (groups, C/g, n), of inputs or outputs of a layer.

        Args:
            layer: An ``nn.Linear`` or ``nn.Conv2d``.
            x: Features, (..., C) of a Linear layer, (B, C, H, W) or (C, H, W) of a convolution.
            stride: Samples one vector in ``stride``.
        """
        if isinstance(layer, nn.Conv2d):
            x = x.flatten(-2).reshape(-1, x.shape[-3], x.shape[-2] * x.shape[-1])  # (B, C, H * W)
            places = self.draw(len(x), x.shape[-1], stride)
            if places is not None:  # different pixels in each image
                x = x.gather(2, places[:, None].to(x.device).expand(-1, x.shape[1], -1))  # (B, C, n / B)
            return x.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (groups, C/g, n)
        x = x.flatten(0, -2) if x.dim() > 1 else x[None]  # (tokens, C)
        images = self.parts(len(x))
        places = self.draw(images, len(x) // images, stride)
        if places is not None:
            places += torch.arange(0, len(x), len(x) // images, device='cpu')[:, None]
            x = x.index_select(0, places.flatten().to(x.device))  # (n, C)
        return x.mT[None]  # (1, C, n)

    def parts(self, number: int) -> int:
        """Returns the number of images that some vectors come from; 1 if it does not divide their number."""
        return self.images if self.images and number % self.images == 0 else 1

    def draw(self, rows: int, length: int, stride: int) -> Tensor | None:
        """Returns random indices below ``length``, with replacement, (rows, number); None stands for all."""
        number = -(-length // stride)
        if self.most is not None:
            number = min(number, -(-self.most // max(rows, 1)))
        if number == length:
            return None
        return torch.randint(length, (rows, number), generator=self.generator, device='cpu')

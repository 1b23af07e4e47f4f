"""Rivals of the domain fit: image filters, and the alignment of blocks at test time."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import cv2
import torch
from torch import Tensor, nn

from mmdenoiserep.core.calibration.match import transport
from mmdenoiserep.core.calibration.moments import Moments
from mmdenoiserep.core.utils.intercept import intercepting

NO_FILTER, BLIND = 'none', 'Gaussian 1'
FILTERS: dict[str, Callable] = {
    NO_FILTER: lambda image: image,
    **{f'Gaussian {sigma}': partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=sigma) for sigma in (0.5, 1, 1.5)},
    **{f'median {size}': partial(cv2.medianBlur, ksize=size) for size in (3, 5)},
    **{f'NLM {h}': partial(cv2.fastNlMeansDenoising, h=h, searchWindowSize=11) for h in (10, 20, 40)},
}
"""Filters of one image, (H, W, C), uint8: Gaussian and median by pixels, non-local means (NLM) by grey levels."""
BLOCKS = {'TransformerEncoderLayer': -1, 'SwinBlock': -1, 'VSSBlock': -1, 'BasicBlock': 1}
"""The dimension of the channels in the output of each class of blocks."""
MOMENTUM = 0.1
"""Weight of a batch in the running statistics."""


def smooth(images: Tensor, name: str) -> Tensor:
    """Returns images, (N, C, H, W), uint8, after a filter of :data:`FILTERS`."""
    if name == NO_FILTER:
        return images
    filtered = [FILTERS[name](image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]
    filtered = torch.stack([torch.from_numpy(image).view(images.shape[2:] + images.shape[1:2]) for image in filtered])
    return filtered.permute(0, 3, 1, 2).contiguous()


class BlockAlignment(nn.Module):
    """A backbone whose blocks are aligned with the training domain, batch by batch, while it predicts.

    This is our reading of PEA (Xiao et al., ICLR 2026): a first forward measures how far the statistics of each block
    are from the source, ``|mu_t - mu_s| + |var_t - var_s|``; these distances, scaled to 0 to 1 over the blocks, are the
    strengths w. In a second forward each block's output x becomes ``x + w (A x + c - x)``, where A and c are the map of
    :func:`transport` from the running statistics of the stream to the source. Unlike PEA, it takes no augmented images,
    never resets the statistics, and solves all channels together instead of groups of 64, with the ridge of a fit.

    Args:
        backbone: The backbone; nothing of it changes.
        source: Moments of the blocks on clean training images, see :meth:`measure`.
    """

    def __init__(self, backbone: nn.Module, source: dict[str, Moments]) -> None:
        super().__init__()
        self.backbone, self.source = backbone, source
        self.blocks = blocks_of(backbone)
        self.running: dict[str, Moments] = {}

    def forward(self, images: Tensor) -> Any:
        """Returns the outputs of the backbone for a batch of images, (B, C, H, W), of any size."""
        seen = self.measure(self.backbone, [images])
        distances = torch.tensor([distance(seen[name], self.source[name]) for name in self.blocks])
        strengths = (distances - distances.min()) / (distances.max() - distances.min()).clamp_min(1e-12)
        run = partial(self._align, dict(zip(self.blocks, strengths.tolist(), strict=True)))
        with intercepting(self.blocks, run):
            return self.backbone(images)

    def _align(self, strengths: dict[str, float], name: str, forward: Callable, *args: Any, **keywords: Any) -> Tensor:
        x = forward(*args, **keywords)
        channels = BLOCKS[type(self.blocks[name]).__name__]
        batch = Moments.of(vectors(x, channels))
        running = self.running.setdefault(name, batch)
        batch.mean = torch.lerp(running.mean, batch.mean, MOMENTUM)
        batch.scatter = batch.count * torch.lerp(running.covariance, batch.covariance, MOMENTUM)
        self.running[name] = batch
        linear, constant = (value[0].to(x) for value in transport(self.source[name], batch))
        aligned = (x.movedim(channels, -1) @ linear.mT + constant).movedim(-1, channels)
        return torch.lerp(x, aligned, strengths[name])

    @staticmethod
    def measure(backbone: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
        """Returns the moments of all tokens or pixels behind each block, by the block's name."""
        blocks, moments = blocks_of(backbone), {}

        def run(name: str, forward: Callable, *args: Any, **keywords: Any) -> Tensor:
            output = forward(*args, **keywords)
            x = vectors(output, BLOCKS[type(blocks[name]).__name__])
            moments.setdefault(name, Moments(1, x.shape[1])).update(x)
            return output

        with intercepting(blocks, run):
            for batch in batches:
                backbone(batch)
        return moments


def blocks_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks of a backbone by name."""
    return {name: module for name, module in backbone.named_modules() if type(module).__name__ in BLOCKS}


def vectors(x: Tensor, channels: int) -> Tensor:
    """Returns a block's output with the given dimension of channels as (1, C, number of vectors)."""
    return x.movedim(channels, 0).flatten(1)[None]


def distance(one: Moments, other: Moments) -> float:
    """Returns the distance of two means plus the distance of two vectors of variances."""
    variances = [moments.covariance.diagonal(dim1=1, dim2=2) for moments in (one, other)]
    return ((one.mean - other.mean).norm() + (variances[0] - variances[1]).norm()).item()

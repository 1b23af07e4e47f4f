"""The vectors of a layer by image, and their moments in the two halves of the images that differ most in content."""

import torch
from torch import Tensor

from .features import Features
from .moments import RIDGE, Moments, add_ridge, gather_processes

ITERATIONS = 20
"""Steps of the power iteration that finds the main direction of the images."""


class ImageVectors:
    """Vectors of a layer, image by image.

    Two halves of the images show how far moments move with what the images show. Chance halves would differ by the
    error of sampling alone; these differ by content: with the mean vector ``m_i`` of image i, centred, and the training
    domain's covariance ``S = L L^T``, the images are ordered by the main right-singular vector of ``[L^-1 m_i]``, and
    cut in the middle.

    Args:
        features: What is gathered of the layer.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self.parts: list[Tensor] = []

    def add(self, vectors: Tensor, images: int) -> None:
        """Adds the vectors of a batch.

        Args:
            vectors: Those of the first image first, (groups, channels, n).
            images: How many images they are of, equally many of each.
        """
        self.parts.append(vectors.unflatten(2, (images, -1)))  # (groups, channels, images, n / images)

    def halves(self, root: Tensor) -> tuple[Moments, Moments]:
        """Returns the moments of both halves, in all processes; the first one is empty if there is one image.

        Args:
            root: L of the covariance in the training domain, lower triangular, (groups, C, C), float32 or float64.
        """
        features = self.features
        none = torch.empty(features.groups, features.channels, 0, dtype=root.dtype, device=root.device)
        own = torch.cat([none, *(part.to(root.dtype).mean(3) for part in self.parts)], 2)  # (groups, channels, images)
        processes = gather_processes(own.cpu())
        means = torch.cat(processes, 2).to(root)
        if features.follows:
            means = features.layer.weight.flatten(1).to(root) @ means
        centred = means - means.mean(2, keepdim=True)
        scores = main_direction(torch.linalg.solve_triangular(root, centred, upper=False).flatten(0, 1))
        first = torch.zeros(len(scores), dtype=torch.bool, device='cpu')
        first[scores.cpu().argsort(stable=True)[: len(scores) // 2]] = True
        rank = torch.distributed.get_rank() if len(processes) > 1 else 0
        first = first.split([process.shape[2] for process in processes])[rank]
        return self._moments(first), self._moments(~first)

    def _moments(self, chosen: Tensor) -> Moments:
        """Returns the moments of some images, of all processes, by a mask of the images of this one."""
        gathered, start = self.features.empty(), 0
        for part in self.parts:
            mask = chosen[start : start + part.shape[2]].to(part.device)
            gathered.update(part[:, :, mask].flatten(2))
            start += part.shape[2]
        gathered.merge_processes()
        return self.features.moments(gathered)


def root_of(source: Moments, dtype: torch.dtype) -> Tensor:
    """Returns L, lower triangular, of ``S + r I = L L^T`` with the ridge r of a fit."""
    return torch.linalg.cholesky(add_ridge(source.covariance, RIDGE * source.variance).to(dtype))


def main_direction(columns: Tensor) -> Tensor:
    """Returns the main right-singular vector of a matrix, up to its sign, by power iteration.

    Args:
        columns: (rows, columns).
    """
    vector = columns[columns.square().sum(1).argmax()]
    for _ in range(ITERATIONS):
        vector = columns.mT @ (columns @ vector)
        vector = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return vector

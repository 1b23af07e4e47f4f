"""The vectors of a layer by image, and their moments in the two halves of the images that differ most in content."""

import torch
from torch import Tensor

from .features import Features
from .moments import Moments, gather_processes

ITERATIONS = 20
"""Steps of the power iteration that finds the main direction of the images."""
ALIKE = 1e-5
"""Images whose mean vectors differ by less, relative to the largest component, are copies of one."""


class ImageVectors:
    """Vectors of a layer, image by image, as they flow: on the device and in the dtype of the forward.

    Two halves of the images show how far moments move with what the images show. Chance halves would differ by the
    error of sampling alone; these differ by content: with the mean vector ``m_i`` of image i, centred, and the training
    domain's covariance ``S + r I = L L^T``, the images are ordered by the main right-singular vector of ``[L^-1 m_i]``,
    and cut in the middle.

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
            images: Number of images, equally many vectors of each.
        """
        if vectors.shape[2]:
            self.parts.append(vectors.detach().unflatten(2, (images, -1)))  # (groups, channels, images, n / images)

    @torch.no_grad()
    def halves(self, factor: Tensor) -> tuple[Moments, Moments]:
        """Returns the moments of both halves, in all processes; the first ones are empty if all images are alike.

        Args:
            factor: L in the training domain, lower triangular, (groups, size, size), float32 or float64.
        """
        features = self.features
        none = torch.empty(features.groups, features.channels, 0, dtype=factor.dtype, device=factor.device)
        own = torch.cat([none, *(part.mean(3, dtype=factor.dtype) for part in self.parts)], 2)
        processes = gather_processes(own.cpu())
        means = torch.cat(processes, 2).to(factor)  # (groups, channels, images)
        if features.follows:
            means = features.layer.weight.flatten(1).to(factor) @ means  # (1, C_out, images)
        centred = means - means.mean(2, keepdim=True)
        scores = main_direction(torch.linalg.solve_triangular(factor, centred, upper=False).flatten(0, 1))
        first = torch.zeros(len(scores), dtype=torch.bool, device='cpu')
        if means.numel() and (centred.abs() > ALIKE * means.abs().max()).any():
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

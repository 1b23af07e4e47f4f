"""How far the first layer's features are from the training domain."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import Moments, evaluating
from ..core.calibration.features import Features
from ..core.calibration.moments import RIDGE, add_ridge, gather_processes
from ..core.method.probe import run_model
from ..core.method.sample import Sample
from ..core.utils.intercept import intercepting

STRIDE = 4
"""One in so many vectors is taken."""
DISTANCES = 'distances'
"""Key in the metadata of a file of moments: the distances of the training images."""


class Distances(NamedTuple):
    """Squared Mahalanobis distances ``(x - mu)^T (S + r I)^-1 (x - mu)`` of feature vectors to the training domain.

    Attributes:
        quartile: The lower quartile.
        mean: The mean.
    """

    quartile: float
    mean: float

    def relative_to(self, other: 'Distances') -> 'Distances':
        """Returns the ratios to other distances; NaN where those are 0."""
        quartile, mean = (its or torch.nan for its in other[:2])
        return Distances(self.quartile / quartile, self.mean / mean)

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> 'Distances | None':
        """Returns the distances in the metadata of a file of moments; None if it has none."""
        values = about.get(DISTANCES)
        if not isinstance(values, Mapping) or not all(isinstance(values.get(key), float) for key in cls._fields):
            return None
        return cls(*(values[key] for key in cls._fields))


def measure_distances(
    part: nn.Module, layers: Mapping[str, Any], batches: Iterable[Tensor], source: Mapping[str, Moments]
) -> Distances:
    """Returns the distances of the first layer's features to the training domain; NaN where it has no variance.

    Args:
        part: The model, as it was when the moments were gathered.
        layers: Its layers by name, first executed first.
        batches: Images, (B, C, H, W); each process has its own.
        source: Moments in the training domain by layer name.
    """
    name, layer = next(iter(layers.items()))
    features, seen = Features(layer), source[name].to(layer.weight.device)
    if not (seen.count and seen.variance > 0):
        return Distances(torch.nan, torch.nan)
    covariance = add_ridge(seen.covariance, RIDGE * seen.variance)
    root = torch.linalg.cholesky(
        covariance.to(torch.promote_types(layer.weight.dtype, torch.float32))
    )  # (groups, C, C)
    found: list[Tensor] = []
    number, images = 0, 1

    def note(_: str, forward: Callable, *args: Tensor, **keywords: Tensor) -> Tensor:
        output = forward(*args, **keywords)
        if len(found) == number:  # its first call
            (x,) = (*args, *keywords.values())
            sample = Sample(seed=number, images=images)
            vectors = features.vectors(sample, x, STRIDE, output).to(root)  # (groups, C, n)
            if features.follows:
                vectors = layer.weight.flatten(1).to(root) @ vectors
                vectors = vectors if layer.bias is None else vectors + layer.bias.to(root)[:, None]
            whitened = torch.linalg.solve_triangular(root, vectors - seen.mean[..., None].to(root), upper=False)
            found.append(whitened.square().sum((0, 1)).float().cpu())  # (n,)
        return output

    with evaluating(part), intercepting({name: layer}, note):
        for number, batch in enumerate(batches):  # noqa: B007  (note reads it)
            images = len(batch)
            run_model(part, batch)
    distances = torch.cat([torch.empty(0), *(part for parts in gather_processes(found) for part in parts)])
    if not len(distances):
        return Distances(torch.nan, torch.nan)
    quartile = distances.kthvalue(len(distances) // 4 + 1).values
    return Distances(quartile.item(), distances.mean().item())

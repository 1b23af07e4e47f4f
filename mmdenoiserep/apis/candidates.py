"""The candidates of a domain fit: the untouched model, and the fits of some or all layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.calibration.takers import owned_tensors

NOTHING, HALF_STRENGTH = 'nothing', 'half-strength'
PARTS = ('first', 'early', 'all')
"""The first layer, the first half of the layers, and all layers."""
CANDIDATES = (NOTHING, *PARTS, HALF_STRENGTH)
"""The untouched model; fits of the first layer, the early half and all layers; the mean of first and last."""


def layers_of(layers: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns the layers of one of :data:`PARTS`, with the middle one of an odd number.

    Args:
        layers: All layers by name, first executed first.
        part: The part.
    """
    count = dict(first=1, early=(len(layers) + 1) // 2, all=len(layers))[part]
    return dict(list(layers.items())[:count])


class Candidates:
    """The candidates of one fit, as values for the tensors of the model.

    The layers are fitted in the order of execution, and each tensor by one layer at most. So a fit of the early half is
    the tensors that the early layers changed in a fit of all layers, and the original ones otherwise. The map of a
    layer enters its weight linearly, ``W A``, so the mean of both weights is the weight of the map ``(I + A) / 2``. So
    is the mean of both biases and running means; that of LayerNorm biases, ``A^-1 c``, is half a constant for A near I.

    Args:
        part: The model before the fit.
        layers: The layers to fit by name, first executed first.
    """

    def __init__(self, part: nn.Module, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self.owned = [(name, tensor) for name, tensor in owned_tensors(part, layers) if tensor is not None]
        self.before = [tensor.detach().clone() for _, tensor in self.owned]
        self.after: dict[str, dict[int, Tensor]] = {}

    def note(self, layer: str) -> None:
        """Notes which tensors the fit of a layer changed; to be called after each layer."""
        if layer in self.after:  # another pass, after the first one was undone
            self.after.clear()
        known = {number for changed in self.after.values() for number in changed}
        self.after[layer] = {
            number: tensor.detach().clone()
            for number, (owner, tensor) in enumerate(self.owned)
            if number not in known
            and (owner == layer or owner not in self.layers)  # a norm takes the constant of some layer
            and not torch.equal(tensor, self.before[number])
        }

    @torch.no_grad()
    def apply(self, name: str) -> None:
        """Sets the model to a candidate."""
        fitted = self.names(name)
        for layer, changed in self.after.items():
            for number, after in changed.items():
                before = self.before[number]
                if layer not in fitted:
                    after = before
                elif name == HALF_STRENGTH:
                    after = torch.lerp(before, after, 0.5)
                self.owned[number][1].copy_(after)

    def twins(self) -> dict[str, str]:
        """Returns for each candidate the first one with the same weights, perhaps itself."""
        found: dict[Any, str] = {}
        twins = {}
        for name in CANDIDATES:
            changed = frozenset(layer for layer in self.names(name) if self.after.get(layer))
            twins[name] = found.setdefault((changed, bool(changed) and name == HALF_STRENGTH), name)
        return twins

    def names(self, name: str) -> list[str]:
        """Returns the names of the layers that a candidate has fitted."""
        if name == NOTHING:
            return []
        return list(layers_of(self.layers, 'all' if name == HALF_STRENGTH else name))

"""Which norm takes the constant of a layer without a bias, and which layers can't be fitted."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..method.layers import Layer
from ..utils.storage import shared_parameters
from .features import fitted_on_output
from .norms import find_norms, taker, why_not_norm
from .readers import Readers


@dataclass
class Takers:
    """Where the maps of layers can go.

    Attributes:
        norms: By layer name, what takes its constant: the bias of the LayerNorm that it alone reads, or the running
            mean of the BatchNorm that alone reads it.
        reasons: By layer name, why its norm takes none.
        unfit: By layer name, why it can't be fitted.
    """

    norms: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)

    @classmethod
    def seen_by(
        cls, readers: Readers, module: nn.Module, layers: Mapping[str, Layer], obstacles: Mapping[str, str]
    ) -> 'Takers':
        """Returns the takers that the runs of a model have shown.

        Args:
            readers: Watched the layers and all norms, and :func:`owned_tensors` of them.
            module: The model.
            layers: The layers to fit.
            obstacles: Of :func:`find_obstacles`.
        """
        takers, norms, tied = cls(), find_norms(module), shared_parameters(module)
        shared = {name for name, tensor in owned_tensors(module, layers) if id(tensor) in tied}
        in_use = readers.read_elsewhere | shared
        takers.unfit = {
            name: 'its weight or bias is used outside of its own forward' for name in layers if name in in_use
        }
        for giver, reader in readers.pairs().items():
            if giver in layers and fitted_on_output(layers[giver]) and isinstance(norms.get(reader), _BatchNorm):
                layer, name = giver, reader
            elif (
                reader in layers and not fitted_on_output(layers[reader]) and isinstance(norms.get(giver), nn.LayerNorm)
            ):
                layer, name = reader, giver
            else:
                continue
            reason = obstacles[name]
            if not reason and name in in_use:
                reason = 'what would take it is used by others'
            tensor = taker(norms[name])
            if reason:
                takers.reasons[layer] = f'{name}, {reason}'
            elif tensor is not None:
                takers.norms[layer] = tensor
        return takers

    def agree(self, other: 'Takers') -> bool:
        """Whether both send all maps to the same places."""
        return self.norms.keys() == other.norms.keys() and self.unfit.keys() == other.unfit.keys()


def owned_tensors(module: nn.Module, layers: Mapping[str, Layer]) -> list[tuple[str, Tensor | None]]:
    """Returns what a fit of some layers may write: name of the owner, tensor."""
    return [
        *((name, tensor) for name, layer in layers.items() for tensor in (layer.weight, layer.bias)),
        *((name, taker(norm)) for name, norm in find_norms(module).items()),
    ]


def find_obstacles(module: nn.Module) -> dict[str, str]:
    """Returns why the norms of a model take no constant, or an empty text, by name."""
    return {name: why_not_norm(norm) for name, norm in find_norms(module).items()}

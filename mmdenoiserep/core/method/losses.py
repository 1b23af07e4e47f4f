"""The loss of all denoisers of a model, taken while the model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import DenoiseLayer
from .sample import Sample


class DenoiseLosses:
    """Listens to the inputs of the denoised layers in a model's last forward; see :func:`denoise_losses`.

    Args:
        module: The model.
        tokens: How many tokens (pixels, for a convolution) of each call of a layer are kept; None keeps all.

    Attributes:
        layers: The denoised layers by name.
        draw: Number of the next forward, the seed of its random choice of tokens.
        ran: Names of the layers that have run in any forward.
        depth: How many forwards of the model are open; a model may call itself, which is a part of its forward.

    Raises:
        ValueError: The model has no denoised layer.
    """

    def __init__(self, module: nn.Module, tokens: int | None = 128) -> None:
        self.layers = {name: m for name, m in module.named_modules() if isinstance(m, DenoiseLayer)}
        if not self.layers:
            raise ValueError('the model has no denoised layer; convert it with apply_denoiserep first')
        self.tokens = tokens
        self.draw = 0
        self.ran: set[str] = set()
        self.depth = 0
        self._inputs: dict[str, list[tuple[Tensor, int]]] = {}
        self._open = False

    def mean(self, weight: float = 1.0) -> Tensor:
        """Returns ``weight * (mean of the losses of the N layers that ran)``; lets the tokens go.

        The gradient that it hands to each denoiser is limited to that of a curvature of 1 (see
        :func:`~.loss.limit_curvature`): features of any size train with any learning rate that suits the model.

        Args:
            weight: lambda of the joint loss, positive.

        Returns:
            A scalar; 0 where no trainable denoiser ran.
        """
        inputs, self._inputs = self._inputs, {}
        self.depth = 0  # an interrupt ends a forward without a word
        if not inputs:
            # a gradient of 0 for every denoiser, for several processes have to agree on who has one
            parameters = [p for layer in self.layers.values() for p in layer.denoiser.parameters()]
            return torch.stack([p.sum() * 0 for p in parameters]).sum()
        losses = []
        for name, calls in inputs.items():
            total = max(sum(size for _, size in calls), 1)
            shares = [(vectors, size / total) for vectors, size in calls]
            losses.append(self.layers[name].denoise_loss_of(shares, limit=len(inputs) / weight))
        return weight * torch.stack(losses).mean()

    def clear(self) -> None:
        """Lets the tokens go, and listens no more before the next forward begins."""
        self._inputs = {}
        self._open = False

    def _begin(self, *_: Any) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self._inputs = {}
        self._sample = Sample(most=self.tokens, seed=self.draw)
        self.draw += 1
        self._open = True

    def _end(self, *_: Any) -> None:
        self.depth = max(self.depth - 1, 0)
        if not self.depth:
            self._open = False

    def _listen(self, name: str, layer: DenoiseLayer, x: Tensor) -> None:
        if not self._open:
            return
        self.ran.add(name)
        if any(p.requires_grad for p in layer.denoiser.parameters()):
            self._inputs.setdefault(name, []).append((self._sample(layer, x.detach()), x.numel()))


@contextmanager
def denoise_losses(module: nn.Module, tokens: int | None = 128) -> Iterator[DenoiseLosses]:
    """Takes the loss of the denoisers of a model while it trains.

    While the model's forward is open, every denoised layer whose denoiser is trainable hands over some tokens of its
    detached input. So activation checkpointing, which runs layers again in the backward pass, changes nothing, and a
    layer that a forward leaves out has no part in that loss. The tokens are a random choice, another one in each
    forward, so that the expectation of the loss is the loss over all of them; no other random number is touched.

    Args:
        module: The model, whose forward is called.
        tokens: How many tokens of each call of a layer the loss is taken of; None takes all.

    Yields:
        The :class:`DenoiseLosses`, whose ``mean()`` is added to the loss of the model after each forward.

    Raises:
        ValueError: The model has no denoised layer.
    """
    losses = DenoiseLosses(module, tokens)
    handles = [
        module.register_forward_pre_hook(losses._begin),
        module.register_forward_hook(losses._end, always_call=True),
    ]
    try:
        for name, layer in losses.layers.items():
            handles.append(layer.register_forward_pre_hook(_listener(losses, name), with_kwargs=True))
        yield losses
    finally:
        for handle in handles:
            handle.remove()
        losses.clear()


def _listener(losses: DenoiseLosses, name: str) -> Any:
    def listen(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        (x,) = args or kwargs.values()  # `forward` of nn.Linear and nn.Conv2d takes one tensor
        losses._listen(name, layer, x)  # type: ignore[arg-type]

    return listen

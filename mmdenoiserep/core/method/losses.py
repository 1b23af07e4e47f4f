"""Computes the loss of all denoisers of a model from the inputs that their layers see."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layers import DenoiseLayer, find_denoise_layers
from .loss import losses_of
from .record import find_records
from .sample import Sample


class DenoiseLosses:
    """Records the inputs of the denoised layers in the last forward of a model; see :func:`denoise_losses`.

    Args:
        module: The model.
        tokens: How many tokens (pixels, for a convolution) to sample of each call of a layer; None takes all.

    Attributes:
        layers: The denoised layers by name.
        draw: Number of the next forward, which seeds its sample of tokens.
        ran: Names of the layers that ran in any forward.
        depth: Number of open forwards; more than 1 where the model calls itself.

    Raises:
        ValueError: The model has no denoised layer.
    """

    def __init__(self, module: nn.Module, tokens: int | None = 128) -> None:
        self.layers = find_denoise_layers(module)
        if not self.layers:
            raise ValueError('the model has no denoised layer; convert it with apply_denoiserep first')
        self.tokens = tokens
        self.draw = 0
        self.ran: set[str] = set()
        self.depth = 0
        self._inputs: dict[str, list[tuple[Tensor, int]]] = {}
        self._recording = False
        self._is_copy = False

    def mean(self, weight: float = 1.0) -> Tensor:
        """Returns ``weight * (mean of the losses of the N layers that ran)`` and drops the recorded inputs.

        The gradient of each denoiser is scaled down to a curvature of at most 1 (see :func:`~.loss.limit_curvature`),
        so that one learning rate suits features of any scale.

        Args:
            weight: lambda of the joint loss, positive.

        Returns:
            A scalar; 0 if no trainable denoiser ran.
        """
        inputs, self._inputs = self._inputs, {}
        self.depth = 0  # an interrupted forward may have left it open
        if not inputs:
            # a gradient of 0 for every denoiser: distributed training needs the same gradients on all processes
            parameters = [p for layer in self.layers.values() for p in layer.denoiser.parameters()]
            return torch.stack([p.sum() * 0 for p in parameters]).sum()
        parts = []
        with torch.autocast(next(iter(self.layers.values())).weight.device.type, enabled=False):
            for number, (name, calls) in enumerate(inputs.items()):
                total = max(sum(size for _, size in calls), 1)
                shares = [(vectors, size / total) for vectors, size in calls]
                parts += self.layers[name].loss_parts(shares, number)
            return weight * losses_of(parts, len(inputs), limit=len(inputs) / weight).mean()

    def clear(self) -> None:
        """Drops the recorded inputs, and stops recording until the next forward begins."""
        self._inputs = {}
        self._recording = False

    def _begin(self, *_: Any) -> None:
        self.depth += 1
        if self.depth > 1 or self._is_copy:
            return
        self._inputs = {}
        self._sample = Sample(most=self.tokens, seed=self.draw)
        self.draw += 1
        self._recording = True

    def _end(self, *_: Any) -> None:
        self.depth = max(self.depth - 1, 0)
        if not self.depth:
            self._recording = False

    def _record(self, name: str, layer: DenoiseLayer, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of a layer."""
        if not self._recording:
            return
        self.ran.add(name)
        if any(p.requires_grad for p in layer.denoiser.parameters()):
            (x,) = args or kwargs.values()  # `forward` of nn.Linear and nn.Conv2d takes one tensor
            self._inputs.setdefault(name, []).append((self._sample(layer, x.detach()), x.numel()))

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy of the model, or a file of it, keeps of its hooks: they record nothing."""
        return {**vars(self), '_inputs': {}, '_sample': None, '_recording': False, '_is_copy': True}


@contextmanager
def denoise_losses(module: nn.Module, tokens: int | None = 128) -> Iterator[DenoiseLosses]:
    """Computes the loss of the denoisers of a model while it trains.

    During each forward of the model, forward pre-hooks sample the detached inputs of the layers that have trainable
    denoisers. Activation checkpointing, which runs layers again in the backward pass, records nothing twice, and layers
    that a forward skips have no part in its loss. Each forward samples tokens uniformly, with a generator of its own,
    so the loss is an unbiased estimate of the loss of all tokens.

    Args:
        module: The model, whose forward is called.
        tokens: How many tokens to sample of each call of a layer; None takes all.

    Yields:
        The :class:`DenoiseLosses`; add its ``mean()`` to the loss of the model after each forward.

    Raises:
        ValueError: The model has no denoised layer.
    """
    losses = DenoiseLosses(module, tokens)
    with ExitStack() as stack:
        stack.callback(losses.clear)
        for _, _, record in find_records(module):
            record.has_loss = True
            stack.callback(setattr, record, 'has_loss', False)
        stack.enter_context(module.register_forward_pre_hook(losses._begin))
        stack.enter_context(module.register_forward_hook(losses._end, always_call=True))
        for name, layer in losses.layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(losses._record, name), with_kwargs=True))
        yield losses

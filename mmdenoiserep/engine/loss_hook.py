"""Adds the loss of the denoisers to the losses of the model that a runner trains."""

from collections.abc import Callable
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..core import DenoiseLayer
from ..core.sample import Sample
from .backbone import find_guards

MODES = ('joint', 'label_free')


@HOOKS.register_module()
class DenoiseLossHook(Hook):
    """Trains the denoisers: adds ``loss_denoise`` to the dict that the model returns with ``mode='loss'``.

        joint:       ``L = L_label + weight * mean over layers of L_p``
        label_free:  ``L = mean over layers of L_p``; only the denoisers get a gradient, the backbone stays in eval mode

    While the model's forward is open, every denoised layer hands over some tokens of its detached input; when it
    closes, the losses are computed once and the tokens are let go. So activation checkpointing, which runs layers again
    in the backward pass, changes nothing, and the loss is scaled, accumulated, logged and averaged over processes like
    any other. The tokens (pixels, for a convolution) are a random choice, another one in each iteration, so that the
    expectation of the loss is the loss over all of them. They depend on the number of the iteration alone: the random
    numbers of the training stay as they were, and a resumed run draws the same.

    In label-free mode the model's forward runs without gradients, so it needs no more memory than an evaluation.

    The input and the correction are constants for the label loss, so ``weight`` scales nothing but the gradient of the
    denoisers: under Adam it makes no difference. Gradient clipping is applied to the denoisers and to the other
    parameters separately, so that the others are clipped as they would be without denoisers.

    Args:
        mode: ``'joint'`` or ``'label_free'``. Label-free training on several processes needs
            ``find_unused_parameters=True`` in the config.
        weight: lambda of the joint loss.
        tokens: How many tokens of each call of a layer the loss is taken of; None takes all.

    Raises:
        ValueError: An unknown mode, a weight or a number of tokens that is not positive; at the start of the training:
            no trainable denoiser in the model, or distributed label-free training without ``find_unused_parameters``.
        RuntimeError: A denoised layer was not executed in the first iteration, or the model was trained without calling
            it with ``mode='loss'``.
    """

    def __init__(self, mode: str = 'joint', weight: float = 0.01, tokens: int | None = 128) -> None:
        if mode not in MODES:
            raise ValueError(f'mode of DenoiseLossHook must be one of {", ".join(MODES)}, got {mode!r}')
        if not weight > 0:
            raise ValueError(f'weight of DenoiseLossHook must be positive, got {weight}')
        if tokens is not None and not tokens > 0:
            raise ValueError(f'tokens of DenoiseLossHook must be a positive number, or None for all, got {tokens}')
        self.mode = mode
        self.weight = weight
        self.tokens = tokens
        self.iteration = 0

    def before_train(self, runner) -> None:
        """Starts listening; later than EMAHook's deep copy of the model, which stays without these hooks."""
        runner.model.train()  # as the loop does next: some backbones (Swin) freeze their stages only then
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers = {name: m for name, m in model.named_modules() if isinstance(m, DenoiseLayer)}
        if not layers:
            raise ValueError(
                'DenoiseLossHook found no denoised layer in the model; wrap the backbone: model = dict(backbone=dict('
                "_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone))"
            )
        self.layers = {n: m for n, m in layers.items() if any(p.requires_grad for p in m.denoiser.parameters())}
        if not self.layers:
            raise ValueError(
                'all denoisers are frozen with their layers (frozen_stages?), so there is nothing to train'
            )
        unused_allowed = getattr(runner.model, 'find_unused_parameters', True)
        if self.mode == 'label_free' and runner.world_size > 1 and not unused_allowed:
            raise ValueError(
                'label-free training gives only the denoisers a gradient, which several processes have to be told: '
                'add find_unused_parameters = True to the config'
            )
        self.inputs: dict[str, list[tuple[Tensor, int]]] | None = None
        self.first = True
        self.handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._enable_grad, always_call=True),
            model.register_forward_hook(self._close),
            *(layer.register_forward_pre_hook(self._listener(name)) for name, layer in self.layers.items()),
        ]
        self.guards = [guard for _, _, guard in find_guards(model)]
        for guard in self.guards:
            guard.satisfied = True
        denoisers = {id(p) for layer in layers.values() for p in layer.denoiser.parameters()}
        wrapper = runner.optim_wrapper
        wrappers = wrapper.optim_wrappers.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        self.clipped = [w for w in wrappers if getattr(w, 'clip_grad_kwargs', None)]
        for wrapper in self.clipped:
            wrapper.clip_func = _SeparateClip(wrapper.clip_func, denoisers)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Label-free: holds the backbone and all running statistics in eval mode, which ``train()`` has just left."""
        self.iteration = runner.iter
        if self.mode == 'label_free':
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            for child in model.children():
                denoised = any(isinstance(m, DenoiseLayer) for m in child.modules())
                if denoised:
                    child.eval()  # as the backbone means it: LeViT makes a cache there that its forward reads
                for module in child.modules():
                    if denoised or isinstance(module, _NormBase):
                        module.training = False

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Makes sure that the first iteration has passed where the loss is added."""
        if self.first:
            raise RuntimeError(
                "the model was trained without calling it with mode='loss', where DenoiseLossHook adds the loss of the "
                'denoisers; its train_step must do that'
            )

    def after_train(self, runner) -> None:
        """Stops listening."""
        for handle in self.handles:
            handle.remove()
        for guard in self.guards:
            guard.satisfied = False
        for wrapper in self.clipped:
            wrapper.clip_func = wrapper.clip_func.clip
        self.layers = {}

    def _open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs = {name: [] for name in self.layers} if kwargs.get('mode') == 'loss' else None
        self.sample = Sample(most=self.tokens, seed=self.iteration)
        self.grad = torch.is_grad_enabled()
        if self.inputs is not None and self.mode == 'label_free':
            torch.set_grad_enabled(False)

    def _enable_grad(self, *_: Any) -> None:
        torch.set_grad_enabled(self.grad)

    def _listener(self, name: str) -> Callable:
        def listen(layer: nn.Module, args: tuple) -> None:
            if self.inputs is not None:
                self.inputs[name].append((self.sample(layer, args[0].detach()), args[0].numel()))

        return listen

    def _close(self, model: nn.Module, args: tuple, losses: Any) -> dict | None:
        if self.inputs is None:
            return None
        inputs, self.inputs = self.inputs, None
        if self.first:
            self.first = False
            if idle := [name for name, stash in inputs.items() if not stash]:
                raise RuntimeError(
                    f'these layers have a denoiser but are not called in training: {", ".join(idle)}; '
                    'add them to exclude of DenoiseRepBackbone'
                )
        loss = torch.stack([_layer_loss(self.layers[n], stash) for n, stash in inputs.items() if stash]).mean()
        if self.mode == 'label_free':
            return dict(loss_denoise=loss)
        return dict(losses, loss_denoise=self.weight * loss)


def _layer_loss(layer: DenoiseLayer, inputs: list[tuple[Tensor, int]]) -> Tensor:
    """Returns the loss over the tokens of all calls of a layer in one iteration (a shared layer has several)."""
    total = max(sum(size for _, size in inputs), 1)
    return torch.stack([layer.denoise_loss_of(vectors) * (size / total) for vectors, size in inputs]).sum()


class _SeparateClip:
    """Clips the gradients of the denoisers and of the other parameters separately; returns the norm of the others."""

    def __init__(self, clip: Callable, denoisers: set[int]) -> None:
        self.clip = clip
        self.denoisers = denoisers

    def __call__(self, parameters: list[nn.Parameter], **kwargs) -> Tensor | None:
        own = [p for p in parameters if id(p) in self.denoisers]
        others = [p for p in parameters if id(p) not in self.denoisers]
        norms = [self.clip(group, **kwargs) for group in (own, others) if group]
        return norms[-1] if norms else None

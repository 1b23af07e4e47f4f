"""Adds the loss of the denoisers to the losses of the model that a runner trains."""

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..core import DenoiseLayer, denoise_losses

MODES = ('joint', 'label_free')
SOON = 100
"""After so many iterations, layers that have not been called are named in the log."""


@HOOKS.register_module()
class DenoiseLossHook(Hook):
    """Trains the denoisers: adds ``loss_denoise`` to the dict that the model returns with ``mode='loss'``.

        joint:       ``L = L_label + weight * mean over layers of L_p``
        label_free:  ``L = mean over layers of L_p``; only the denoisers get a gradient, the backbone stays in eval mode

    :func:`mmdenoiserep.denoise_losses` listens while the model's forward is open, so activation checkpointing, which
    runs layers again in the backward pass, changes nothing. The mean is over the layers that run and are trainable in
    that iteration: layers that are dropped at random or unfrozen later take part whenever they can. The loss is scaled,
    accumulated, logged and averaged over processes like any other. The tokens are another random choice in each
    iteration that depends on the number of the iteration alone: a resumed run draws the same.

    In label-free mode the model's forward runs without gradients, so it needs no more memory than an evaluation.

    The input and the correction are constants for the label loss, so ``weight`` scales nothing but the gradient of the
    denoisers: under Adam it makes no difference. That gradient is limited, layer by layer, to a curvature of 1 in the
    whole loss (see :func:`~mmdenoiserep.core.method.loss.limit_curvature`), so that no optimizer diverges on large
    features. Gradient clipping is applied to the denoisers and to the other parameters separately, so that the others
    are clipped as they would be without denoisers.

    Args:
        mode: ``'joint'`` or ``'label_free'``. Label-free training on several processes needs
            ``find_unused_parameters=True`` in the config.
        weight: lambda of the joint loss.
        tokens: How many tokens of each call of a layer the loss is taken of; None takes all.

    Raises:
        ValueError: An unknown mode, a weight or a number of tokens that is not positive; at the start of the training:
            no denoiser in the model, label-free training of frozen ones alone, or on several processes without
            ``find_unused_parameters``; a model that returns a ``loss_denoise`` of its own.
        RuntimeError: The model was trained without calling it with ``mode='loss'``.
    """

    def __init__(self, mode: str = 'joint', weight: float = 0.01, tokens: int | None = 128) -> None:
        if mode not in MODES:
            raise ValueError(f'mode of DenoiseLossHook must be one of {", ".join(MODES)}, got {mode!r}')
        if not weight > 0:
            raise ValueError(f'weight of DenoiseLossHook must be positive, got {weight}')
        if tokens is not None and not tokens > 0:
            raise ValueError(f'tokens of DenoiseLossHook must be a positive number, or None for all, got {tokens}')
        self.mode = mode
        self.weight = weight if mode == 'joint' else 1.0
        self.tokens = tokens
        self.listening = ExitStack()

    def before_run(self, runner) -> None:
        """Makes sure that listening ends with the training loop, however that ends."""
        loop = runner._train_loop  # `train_loop` would build it, also to test
        if isinstance(loop, BaseLoop):
            run = loop.run

            def listening_run() -> Any:
                with self.listening:
                    return run()

            loop.run = listening_run

    def before_train(self, runner) -> None:
        """Starts listening; later than EMAHook's deep copy of the model, which stays without these hooks."""
        runner.model.train()  # as the loop does next: some backbones (Swin) freeze their stages only then
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        denoisers = [layer.denoiser for layer in model.modules() if isinstance(layer, DenoiseLayer)]
        if not denoisers:
            raise ValueError(
                'DenoiseLossHook found no denoised layer in the model; wrap the backbone: model = dict(backbone=dict('
                "_delete_=True, type='DenoiseRepBackbone', backbone=_base_.model.backbone))"
            )
        if not any(p.requires_grad for denoiser in denoisers for p in denoiser.parameters()):
            text = 'all denoisers are frozen with their layers (frozen_stages?), so there is nothing to train'
            if self.mode == 'label_free':
                raise ValueError(text)
            print_log(f'{text} before a layer is unfrozen', logger='current', level=logging.WARNING)
        unused_allowed = getattr(runner.model, 'find_unused_parameters', True)
        if self.mode == 'label_free' and runner.world_size > 1 and not unused_allowed:
            raise ValueError(
                'label-free training gives only the denoisers a gradient, which several processes have to be told: '
                'add find_unused_parameters = True to the config'
            )
        self.called = False
        self.iterations = 0
        stack = self.listening
        stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        self.losses = stack.enter_context(denoise_losses(model, self.tokens))
        for handle in (
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._enable_grad, always_call=True),
            model.register_forward_hook(self._close),
        ):
            stack.callback(handle.remove)
        own = {id(p) for denoiser in denoisers for p in denoiser.parameters()}
        several = isinstance(runner.optim_wrapper, OptimWrapperDict)
        for wrapper in runner.optim_wrapper.optim_wrappers.values() if several else [runner.optim_wrapper]:
            if getattr(wrapper, 'clip_grad_kwargs', None):
                stack.callback(setattr, wrapper, 'clip_func', wrapper.clip_func)
                wrapper.clip_func = _SeparateClip(wrapper.clip_func, own)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Label-free: holds the backbone and all running statistics in eval mode, which ``train()`` has just left."""
        self.losses.draw = runner.iter
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
        """Makes sure that the iteration has passed where the loss is added, and after some, which layers have run."""
        if not self.called:
            raise RuntimeError(
                "the model was trained without calling it with mode='loss', where DenoiseLossHook adds the loss of the "
                'denoisers; its train_step must do that'
            )
        self.iterations += 1
        if self.iterations == SOON:
            self._name_idle_layers()

    def after_train(self, runner) -> None:
        """Stops listening."""
        if self.iterations < SOON:
            self._name_idle_layers()
        self.listening.close()

    def _name_idle_layers(self) -> None:
        if idle := [name for name in self.losses.layers if name not in self.losses.ran]:
            print_log(
                f'{len(idle)} of {len(self.losses.layers)} layers with a denoiser have not been called in training, in '
                f'{self.iterations} iterations: {", ".join(idle)}; if they never are, add them to exclude of '
                'DenoiseRepBackbone',
                logger='current',
                level=logging.WARNING,
            )

    def _open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.losses.depth > 1:  # the model calls itself
            return
        self.grad = torch.is_grad_enabled()
        self.is_loss = _mode(model, args, kwargs) == 'loss'
        if not self.is_loss:
            self.losses.clear()
        elif self.mode == 'label_free':
            torch.set_grad_enabled(False)

    def _enable_grad(self, *_: Any) -> None:
        if not self.losses.depth:
            torch.set_grad_enabled(self.grad)

    def _close(self, model: nn.Module, args: tuple, losses: Any) -> dict | None:
        if self.losses.depth or not self.is_loss:
            return None
        self.called = True
        if 'loss_denoise' in losses:
            raise ValueError(
                "the model returns a loss of its own called 'loss_denoise', the name of what DenoiseLossHook adds; "
                'rename the one of the model'
            )
        loss = self.losses.mean(self.weight)
        return dict(loss_denoise=loss) if self.mode == 'label_free' else dict(losses, loss_denoise=loss)


def _mode(model: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Returns the mode that a model is called with, by keyword or by position."""
    if 'mode' in kwargs:
        return kwargs['mode']
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get('mode')


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

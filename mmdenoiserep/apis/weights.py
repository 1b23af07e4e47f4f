"""Checks how far a checkpoint fits a model: refuses weights that hardly fit, and warns of missing statistics."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..core import DenoiseLayer, InputError
from ..core.files.content import find_weights
from ..core.files.fused import STAMP
from ..core.fusing.fuse import denoiser_keys
from .model import named_values

MIN_SHARE_START = 0.1
"""A checkpoint starts a training only if this share of its tensors, or of the model's parameters, is loaded."""
MIN_SHARE_WHOLE = 0.5
"""A checkpoint is tested or resumed only if this share of the model's parameters is loaded."""


class LoadingCheck:
    """Checks the loading of a checkpoint into a model; create it before the loading.

    A tensor counts as loaded if it was written to. So position embeddings count that the model resizes while loading.

    Args:
        model: The model; it may be wrapped for distributed training or test-time augmentation.
        path: Path of the checkpoint, for messages.
        purpose: ``'start'`` and ``'features'`` need a part of the weights, ``'resume'`` and ``'test'`` most of them.
    """

    def __init__(self, model: nn.Module, path: str, purpose: Literal['start', 'resume', 'test', 'features']) -> None:
        kinds = list(type(model).__mro__)
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
            kinds += type(model).__mro__
        # no process of a sharded model has the tensors of the file
        self.is_sharded = any(re.search('(?i)shard|deepspeed', kind.__name__) for kind in kinds)
        self.model = model
        self.path = path
        self.purpose = purpose
        self.before = {name: (id(tensor), tensor._version) for name, tensor in named_values(model).items()}
        self.shapes: dict[str, Any] = {}

    def unwrap(self, checkpoint: MutableMapping[str, Any]) -> None:
        """Puts the weights of a checkpoint under ``state_dict``, where mmengine looks for them.

        Args:
            checkpoint: Content of the file; it is changed.

        Raises:
            InputError: The checkpoint has no weights.
        """
        notes: list[str] = []
        state = find_weights(checkpoint, Path(self.path), notes)
        if not isinstance(state, Mapping) or not state:
            kind = type(state).__name__ if state else 'empty'
            raise InputError(f'{self.path} has no weights: its state_dict is {kind}; take another checkpoint')
        checkpoint['state_dict'] = copy.copy(state) if state is checkpoint else state
        for note in notes:
            print_log(f'{self.path}: {note}', logger='current')

    def check_content(self, checkpoint: Mapping[str, Any]) -> None:
        """Checks the denoisers of a checkpoint, before the loading.

        Args:
            checkpoint: Content of the file, with weights under ``state_dict``.

        Raises:
            InputError: The checkpoint has denoisers that the model lacks, or is fused and the model has denoisers.
        """
        state = {re.sub(r'^module\.', '', str(name)): value for name, value in checkpoint['state_dict'].items()}
        self.shapes = {name: getattr(value, 'shape', None) for name, value in state.items()}
        # a semi-supervised model gives the weights of a detector to its student and its teacher
        known = [f'.{name}' for name in named_values(self.model)]
        unknown = sorted(name for name in denoiser_keys(state) if not any(k.endswith(f'.{name}') for k in known))
        is_denoised = any(isinstance(module, DenoiseLayer) for module in self.model.modules())
        if unknown and not is_denoised:
            raise InputError(
                f'{self.path} has denoisers and the config has none; run tools/fuse_checkpoint.py {self.path} OUT, '
                'or take the config that it was trained with'
            )
        if unknown:
            raise InputError(
                f'{self.path} has denoisers that the config does not make ({unknown[0]}); '
                'take the targets and the rank that it was trained with'
            )
        meta = checkpoint.get('meta')
        if is_denoised and self.purpose in ('test', 'features') and isinstance(meta, Mapping) and STAMP in meta:
            raise InputError(f'{self.path} is fused; take the config without DenoiseRepBackbone')

    def check_model(self) -> None:
        """Checks the model after the loading, and logs a warning if BatchNorm statistics are missing.

        Raises:
            InputError: The checkpoint hardly fits the model, has denoisers of another shape, or, to test or resume,
                parameters of another shape; or, to test or get features, it lacks BatchNorm statistics.
        """
        if self.is_sharded:
            return
        given = {
            name
            for name, tensor in named_values(self.model).items()
            if (id(tensor), tensor._version) != self.before.get(name) or self.shapes.get(name) == tensor.shape
        }
        expected = self._parameters()
        denoisers = {name for name, _ in self.model.named_parameters()} & set(denoiser_keys(self.model.state_dict()))
        fitting = [name for name in expected if name in given]
        is_whole = self.purpose in ('resume', 'test')
        least = MIN_SHARE_WHOLE * len(expected) if is_whole else MIN_SHARE_START * min(len(expected), len(self.shapes))
        if expected and (not fitting or len(fitting) < least):
            raise InputError(
                f'{self.path} does not fit the model of the config: it has {len(fitting)} of {len(expected)} '
                f'parameters; the file has {_first(name for name in self.shapes if name not in given)}, '
                f'the model needs {_first(name for name in expected if name not in given)}'
            )
        self._refuse_other_shapes([*sorted(denoisers), *(expected if is_whole else ())], given)
        if missing := self._missing_statistics(given):
            sentence = (
                f'{self.path} lacks the statistics of {len(missing)} BatchNorm layers ({_first(missing)}), '
                'which stay as they were initialised'
            )
            if self.purpose in ('test', 'features'):
                raise InputError(f'{sentence}; take a file with the buffers of the model, too')
            print_log(sentence, logger='current', level=logging.WARNING)

    def _parameters(self) -> list[str]:
        """Returns the names of the parameters in the state dict of the model, without denoisers."""
        denoisers = [
            f'{name}.denoiser.' for name, module in self.model.named_modules() if isinstance(module, DenoiseLayer)
        ]
        saved = self.model.state_dict()  # a model with LoRA leaves out some parameters
        return [
            name for name, _ in self.model.named_parameters() if name in saved and not name.startswith(tuple(denoisers))
        ]

    def _refuse_other_shapes(self, expected: Iterable[str], given: set[str]) -> None:
        for name in expected:
            if name in self.shapes and name not in given:
                shape = tuple(self.model.get_parameter(name).shape)
                raise InputError(
                    f'{self.path} does not fit the model of the config: {name} is {tuple(self.shapes[name] or ())} '
                    f'in the file and {shape} in the model'
                )

    def _missing_statistics(self, given: set[str]) -> list[str]:
        """Returns the names of BatchNorm statistics that are missing though the weights of their layer were loaded.

        Statistics are found by name, since frozen norms (torchvision's, detectron2's) have only buffers.
        """
        missing = []
        for name, module in self.model.named_modules():
            kept = module._buffers.keys() - module._non_persistent_buffers_set
            if kept >= {'running_mean', 'running_var'} and isinstance(module.running_mean, Tensor):
                prefix = f'{name}.' if name else ''
                is_meant = module._parameters.get('weight') is None or f'{prefix}weight' in given
                if 'weight' in kept:  # all values of a frozen norm may be missing
                    is_meant = any(key.startswith(name[: name.rfind('.') + 1]) for key in given)
                missing += [
                    f'{prefix}{statistic}'
                    for statistic in ('running_mean', 'running_var')
                    if is_meant and f'{prefix}{statistic}' not in given
                ]
        return missing


def check_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """Checks that a training can be resumed from a checkpoint.

    Args:
        checkpoint: Content of the file.
        path: Path of the file, for messages.

    Raises:
        InputError: The checkpoint has no ``epoch``, ``iter`` or ``message_hub``: it holds released or fused weights.
    """
    meta = checkpoint.get('meta')
    lacking = [key for key in ('epoch', 'iter') if not isinstance(meta, Mapping) or key not in meta]
    lacking += [key for key in ('message_hub',) if key not in checkpoint]
    if lacking:
        raise InputError(
            f'{path} is no checkpoint of a run that could be resumed, for it has no {lacking[0]}; to start from its '
            f'weights do not resume, but set load_from={path} and resume=False'
        )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '') if names else 'nothing else'

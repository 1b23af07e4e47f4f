"""Checks before a training that batches and classes fit the identities of the data."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ...core import InputError
from .sampler import PKSampler


@HOOKS.register_module()
class ReIDCheckHook(Hook):
    """Refuses a training whose batches PKSampler would not fill, or whose head has too few classes.

    ``tools/train.py`` adds it. For another script: ``default_hooks = dict(check=dict(type='ReIDCheckHook'))``.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        """Checks the training data and the model of a runner.

        Raises:
            InputError: ``batch_size`` is not P x K, or the head has fewer classes than there are identities.
        """
        loader = runner.train_dataloader
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        check_batches(loader)
        check_classes(loader.dataset, model)


def check_batches(loader: Any) -> None:
    """Raises InputError if the batches of a data loader are not those of its :class:`PKSampler`."""
    batches = getattr(loader, 'batch_sampler', None)
    sampler = getattr(batches, 'sampler', None)
    if not isinstance(sampler, PKSampler):
        return
    size, wanted = getattr(batches, 'batch_size', None), sampler.num_ids * sampler.num_instances
    if size != wanted:
        raise InputError(
            f'batch_size of train_dataloader is {size}, but PKSampler(num_ids={sampler.num_ids}, '
            f'num_instances={sampler.num_instances}) makes batches of {wanted} images for each process: set batch_size '
            'to their product, or change num_ids'
        )


def check_classes(dataset: Any, model: Any) -> None:
    """Raises InputError if a model's head has fewer classes than a training set has labels."""
    classes = getattr(getattr(model, 'head', None), 'num_classes', None)
    labels = [label for part in labelled(dataset) for label in part.get_gt_labels()]
    if classes is not None and labels and max(labels) >= classes:
        raise InputError(
            f'num_classes of the head is {classes}, but the training set has {max(labels) + 1:,} identities: set '
            f'model.head.num_classes to {max(labels) + 1}'
        )


def labelled(dataset: Any) -> Iterator[Any]:
    """Yields the data sets with one label an image that a data set wraps, or itself."""
    if hasattr(dataset, 'get_gt_labels') and np.ndim(dataset.get_gt_labels()) == 1:
        yield dataset
    else:
        for part in getattr(dataset, 'datasets', None) or filter(None, [getattr(dataset, 'dataset', None)]):
            yield from labelled(part)

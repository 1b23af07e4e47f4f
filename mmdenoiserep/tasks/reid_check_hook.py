"""Checks before training that batch size and number of classes fit the training set."""

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ..core import InputError
from ..datasets.pk_sampler import PKSampler
from ..datasets.reid_datasets import ReIDDataset
from ..models.reid_head import BNNeckReIDHead


@HOOKS.register_module()
class ReIDCheckHook(Hook):
    """Checks the batch size for PKSampler and the number of classes of the head before training.

    ``tools/train.py`` adds this hook. For other scripts set ``custom_hooks = [dict(type='ReIDCheckHook')]``.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        """Checks the training data and the model of a runner.

        Raises:
            InputError: ``batch_size`` is not P x K, or the head has fewer classes than there are identities.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        check_batches(runner.train_dataloader)
        check_classes(runner.train_dataloader, model)


def check_batches(loader: Any) -> None:
    """Raises InputError if the batch size of a data loader is not P x K of its :class:`PKSampler`."""
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


def check_classes(loader: Any, model: Any) -> None:
    """Raises InputError if the head of a model has fewer classes than the data set of a data loader has identities."""
    head = getattr(model, 'head', None)
    classes = getattr(head, 'num_classes', None)
    sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)
    if isinstance(sampler, PKSampler):
        identities = sampler.num_classes
    else:
        parts = parts_of(loader.dataset, any_labelled=isinstance(head, BNNeckReIDHead))
        identities = max((max(part.get_gt_labels()) + 1 for part in parts), default=0)
    if classes is not None and identities > classes:
        raise InputError(
            f'num_classes of the head is {classes}, but the training set has {identities:,} identities: set '
            f'model.head.num_classes to {identities}'
        )


def parts_of(dataset: Any, any_labelled: bool = False) -> Iterator[Any]:
    """Yields the data sets for re-identification in a data set and its wrappers.

    Args:
        dataset: The data set.
        any_labelled: Whether to also yield other data sets with ``get_gt_labels()``.
    """
    if isinstance(dataset, ReIDDataset) or (any_labelled and hasattr(dataset, 'get_gt_labels')):
        yield dataset
    else:
        for part in getattr(dataset, 'datasets', None) or filter(None, [getattr(dataset, 'dataset', None)]):
            yield from parts_of(part, any_labelled)

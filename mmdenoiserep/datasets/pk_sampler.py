"""Batches of P identities with K images each, as the triplet loss needs them."""

from collections.abc import Iterator, Sized
from itertools import count

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from ..core import InputError


@DATA_SAMPLERS.register_module()
class PKSampler(Sampler):
    """Orders a training set so that every P x K indices in a row are K images each of P identities.

    In each pass the images of an identity are shuffled and cut into groups of K; of an identity with fewer than K
    images, one group is drawn with replacement; what is left over of the others is not used. Batches take one group
    each of P random identities that have groups left, until there are fewer than P such identities.

    How many batches a pass gives depends on the draw. Every epoch has as many as the first pass with this seed gives:
    passes follow each other where one is too short. The order depends on seed and epoch only. On several processes,
    whole batches are dealt out in turn, so triplets are formed within a process.

    Args:
        dataset: Training set with ``get_gt_labels()``, as mmpretrain's have it.
        num_ids: P. ``batch_size`` of the dataloader must be P x K.
        num_instances: K.
        seed: Must be the same in all processes; None lets them agree on one.

    Raises:
        InputError: There are fewer than P identities, or too few for all processes, or P or K is less than 1.
    """

    def __init__(self, dataset: Sized, num_ids: int = 16, num_instances: int = 4, seed: int | None = None) -> None:
        if min(num_ids, num_instances) < 1:
            raise InputError(f'num_ids and num_instances must be 1 or more, got {num_ids} and {num_instances}')
        if not hasattr(dataset, 'get_gt_labels'):
            raise InputError(
                f'PKSampler needs a training set with get_gt_labels(), which {type(dataset).__name__} lacks'
            )
        labels = np.asarray(dataset.get_gt_labels())
        self.num_classes = int(labels.max()) + 1
        self.indices = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if len(self.indices) < num_ids:
            raise InputError(f'num_ids={num_ids} identities a batch, but the data set has only {len(self.indices)}')
        self.num_ids = num_ids
        self.num_instances = num_instances
        self.seed = sync_random_seed() if seed is None else seed
        self.rank, self.world_size = get_dist_info()
        self.epoch = 0
        self.num_batches = len(self._one_pass(0, 0)) // self.world_size
        if len(dataset) < len(labels):  # with num_batch_per_epoch
            self.num_batches = min(self.num_batches, len(dataset) // (num_ids * num_instances * self.world_size))
        if not self.num_batches:
            raise InputError(f'the data set has less than one batch for each of the {self.world_size} processes')

    def __iter__(self) -> Iterator[int]:
        batches: list[np.ndarray] = []
        for number in count():
            if len(batches) >= self.num_batches * self.world_size:
                break
            batches += self._one_pass(self.epoch, number)
        own = batches[self.rank : self.num_batches * self.world_size : self.world_size]
        return iter(np.concatenate(own).tolist())

    def __len__(self) -> int:
        return self.num_batches * self.num_ids * self.num_instances

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of this epoch; the runner calls it."""
        self.epoch = epoch

    def _one_pass(self, epoch: int, number: int) -> list[np.ndarray]:
        """Returns the batches of one pass over the data set, each (P K,)."""
        random = np.random.default_rng([self.seed, epoch, number])
        size = self.num_instances
        groups = []
        for indices in self.indices:
            if len(indices) < size:
                groups.append([random.choice(indices, size)])
            else:
                shuffled = random.permutation(indices)
                groups.append(list(shuffled[: len(indices) // size * size].reshape(-1, size)))
        batches = []
        while len(left := [place for place, own in enumerate(groups) if own]) >= self.num_ids:
            chosen = random.choice(left, self.num_ids, replace=False)
            batches.append(np.concatenate([groups[place].pop() for place in chosen]))
        return batches

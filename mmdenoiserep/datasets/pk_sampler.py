"""Samples batches of P identities with K images each, for the triplet loss."""

from collections.abc import Iterator, Sized
from itertools import count

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from ..core import InputError


@DATA_SAMPLERS.register_module()
class PKSampler(Sampler):
    """Samples P random identities with K images each for every batch (Hermans et al. 2017, arXiv 1703.07737).

    Each pass over the data set shuffles the images of every identity and cuts them into groups of K. An identity with
    fewer than K images has one group, drawn with replacement; remaining images of other identities are skipped. A batch
    takes one group from each of P random identities, until fewer than P identities have groups left.

    The number of batches of a pass is random. All epochs have the number of the first pass with this seed, and
    concatenate passes if one is too short. The order depends on seed and epoch alone. Several processes take whole
    batches in turn, so triplets are formed within a process.

    Args:
        dataset: Training set with ``get_gt_labels()``, such as those of mmpretrain.
        num_ids: P, the number of identities. ``batch_size`` of the dataloader must be P x K.
        num_instances: K, the number of images of each identity.
        seed: Seed, the same in all processes; None synchronises a random one.

    Raises:
        InputError: The data set has no ``get_gt_labels()``, fewer than P identities, or less than one batch for each
            process; or P or K is less than 1.
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
        """Sets the epoch, which changes the order; mmengine's runner calls it."""
        self.epoch = epoch

    def _one_pass(self, epoch: int, number: int) -> list[np.ndarray]:
        """Returns the batches of one pass over the data set, arrays of indices of shape (P K,)."""
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

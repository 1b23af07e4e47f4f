"""What a batch is: how many images it holds."""

import dataclasses

import numpy as np
import pytest
import torch

from mmdenoiserep.core.calibration.batches import count_images


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    name: str


IMAGES = torch.zeros(6, 3, 8, 8)


@pytest.mark.parametrize(
    'batch',
    [
        IMAGES,
        IMAGES.numpy(),
        IMAGES[:, 0, 0],
        dict(t=torch.tensor(0.5), x=IMAGES),
        dict(inputs=list(IMAGES), data_samples=[object()] * 6),
        dict(inputs=[torch.zeros(3, 8 + i, 9) for i in range(6)]),
        dict(scale=torch.ones(4), mask=torch.ones(1, 1, 8, 8), inputs=IMAGES),
        (IMAGES, torch.ones(1, 8, 8)),
        dict(inputs=[IMAGES, IMAGES], data_samples=[]),  # two views of each, for contrastive training
        [IMAGES, 0.5, None],
        dict(t=0.5, x=IMAGES.tolist()),
        dict(size=[8, 8], x=IMAGES[:, 0, 0].tolist()),
        [f'{i}.jpg' for i in range(6)],
        [np.zeros((8, 8, 3)) for _ in range(6)],
        Sample(IMAGES, 'six'),
        dict(nested=[dict(images=(IMAGES,)), torch.tensor(1)]),
    ],
)
def test_the_number_of_images_of_a_batch(batch):
    assert count_images(batch) == 6


@pytest.mark.parametrize('batch', [0.5, dict(t=torch.tensor(1.0)), {}, object(), None, 'six'])
def test_a_batch_without_images_is_refused(batch):
    with pytest.raises(ValueError, match=type(batch).__name__):
        count_images(batch)

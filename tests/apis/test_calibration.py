"""What a calibration needs to know before its first pass."""

import torch

from mmdenoiserep.apis import calibration


def test_layers_that_the_first_image_does_not_reach_have_no_flow():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    assert calibration.measure_activations(layer, ['0'], torch.ones(1, 3)) == [
        calibration.ActivationSize(3, 1, 12),
        calibration.ActivationSize(2, 1, 8),
    ]
    assert calibration.choose_every([], 100) == 16 and calibration.fits_memory([], 100, 0.0)

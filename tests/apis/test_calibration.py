"""What a calibration needs to know before its first pass."""

from types import SimpleNamespace

import pytest
import torch

from mmdenoiserep.apis import calibration
from mmdenoiserep.core import InputError


def test_layers_that_the_first_image_does_not_reach_have_no_flow():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    assert calibration.measure_activations(layer, ['0'], torch.ones(1, 3)) == [
        calibration.ActivationSize(3, 1, 12),
        calibration.ActivationSize(2, 1, 8),
    ]
    assert calibration.choose_every([], 100) == 16 and calibration.fits_memory([], 100, 0.0)


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda subject: calibration.open_subject(None, 'in.pth', num_images=-1), 'num_images must be .* 1 or more'),
        (lambda subject: calibration.open_subject(None, 'in.pth', num_images=0), 'num_images must be .* 1 or more'),
        (lambda subject: calibration.open_subject(None, 'in.pth', num_images=None), 'num_images must be .* 1 or more'),
        (lambda subject: calibration.open_subject(None, 'in.pth', batch_size=0), 'batch_size must be .* 1 or more'),
        (
            lambda subject: calibration.open_subject(None, 'in.pth', split='foo'),
            'split must be one of train, val, test',
        ),
        (lambda subject: calibration.solve(subject, every=0), 'every must be a whole number of 1 or more, got 0'),
        (
            lambda subject: calibration.gather_source(subject, every=0),
            'every must be a whole number of 1 or more, got 0',
        ),
        (
            lambda subject: calibration.fit(subject, {}, {}, every=-1),
            'every must be a whole number of 1 or more, got -1',
        ),
        (
            lambda subject: calibration.fit(subject, {}, dict(fit='full')),
            'need names of layers of the model under layers',
        ),
        (lambda subject: calibration.fit(subject, {}, dict(layers=['b'])), 'need names of layers of the model'),
        (
            lambda subject: calibration.choose_fit(subject, fit='foo'),
            'fit must be one of None, full, covariance, .* got',
        ),
        (
            lambda subject: calibration.choose_fit(subject, part='foo'),
            'part must be one of None, first, early, all, got',
        ),
        (lambda subject: calibration.choose_fit(subject, rank=-1), 'rank must be a whole number of 0 or more, got -1'),
    ],
)
def test_arguments_that_do_not_work(call, words):
    with pytest.raises(InputError, match=words):
        call(SimpleNamespace(layers=dict(a=torch.nn.Linear(3, 2))))

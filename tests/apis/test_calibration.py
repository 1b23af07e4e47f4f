"""What a calibration needs to know before its pass."""

from types import SimpleNamespace

import pytest
import torch

from mmdenoiserep.apis import calibration
from mmdenoiserep.apis.calibration import Size, choose_strides, describe_strides, measure_vectors
from mmdenoiserep.core import InputError


def test_strides_follow_the_vectors_of_an_image():
    """A convolution counts by what is gathered of it: its input where that is narrower, else its output."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 2), torch.nn.Flatten(2))
    model.append(torch.nn.Linear(64, 5))
    layers = {'0': model[0], '1': model[1], '3': model[3], 'unused': torch.nn.Linear(2, 2)}
    sizes = measure_vectors(model, layers, torch.ones(1, 3, 9, 9))
    assert sizes == {'0': Size(3, 81), '1': Size(4, 64), '3': Size(64, 4)}
    assert measure_vectors(model, layers, torch.ones(1, 3, 9, 9), inputs=True)['1'] == Size(8, 81)
    assert choose_strides(sizes, 2) == {'0': 5, '1': 3, '3': 1}
    assert choose_strides(sizes, 10_000) == {'0': 16, '1': 16, '3': 16}
    texts = [describe_strides(strides) for strides in (4, choose_strides(sizes, 2), choose_strides(sizes, 10_000), {})]
    assert texts == ['one in 4', 'one in 1 (late layers) to 5', 'one in 16', 'one in 1']


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
        (lambda subject: calibration.solve(subject, stride=0), 'stride must be a whole number of 1 or more, got 0'),
        (
            lambda subject: calibration.gather_source(subject, stride=0),
            'stride must be a whole number of 1 or more, got 0',
        ),
        (
            lambda subject: calibration.fit(subject, {}, stride=-1),
            'stride must be a whole number of 1 or more, got -1',
        ),
    ],
)
def test_arguments_that_do_not_work(call, words):
    with pytest.raises(InputError, match=words):
        call(SimpleNamespace(layers=dict(a=torch.nn.Linear(3, 2))))


@pytest.mark.parametrize(
    ('meta', 'warns'),
    [({}, False), (dict(denoiserep=dict(mode='domain')), True), (dict(denoiserep=dict(mode='schedule')), False)]
    + [(dict(denoiserep=odd), False) for odd in ('domain', None, 1, ['mode'])],
)
def test_only_a_fitted_checkpoint_gives_a_warning(meta, warns):
    """A stranger's file may have anything under our key."""
    warning = calibration.source_warning(SimpleNamespace(checkpoint='a.pth', meta=meta))
    assert warning.startswith('a.pth is fitted to a domain already') == warns and bool(warning) == warns

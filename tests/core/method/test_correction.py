"""The correction of one layer, at full and at low rank: its parts by name, its loss, its steepness, what it fits."""

import pytest
import torch
from torch import nn

from helpers import denoised
from mmdenoiserep.core.method.correction import Correction
from mmdenoiserep.core.method.sample import Sample

FULL = dict(weight=torch.rand(2, 3, 3))
LOW = dict(scale=torch.rand(2), up=torch.rand(2, 3, 1), down=torch.rand(2, 1, 3))
BIAS = dict(bias=torch.rand(6))


@pytest.mark.parametrize(('parameters', 'rank'), [(FULL, None), (FULL | BIAS, None), (LOW, 1), (LOW | BIAS, 1)])
def test_the_names_tell_the_kind(parameters, rank):
    correction = Correction.of(parameters)
    assert correction.rank == rank
    assert correction.tensors.keys() == parameters.keys()
    assert all(correction.tensors[name] is value for name, value in parameters.items())
    assert {value.dtype for value in correction.to(torch.float64).tensors.values()} == {torch.float64}


@pytest.mark.parametrize(
    'parameters',
    [{}, BIAS, FULL | LOW, FULL | dict(gain=torch.ones(1)), *({**LOW, **BIAS, name: None} for name in LOW)],
)
def test_other_names_are_refused(parameters):
    parameters = {name: value for name, value in parameters.items() if value is not None}
    with pytest.raises(ValueError, match=f'incomplete: it has only {", ".join(sorted(parameters))}$'):
        Correction.of(parameters)


@pytest.mark.parametrize('parts', [FULL, FULL | BIAS, LOW, LOW | BIAS], ids=lambda parts: '-'.join(parts))
@pytest.mark.parametrize(
    ('weight', 'bias', 'fits'),
    [
        ((4, 3, 1, 1), (4,), True),
        ((4, 3, 5, 2), None, True),
        ((4, 3), (4,), False),  # a Linear layer has one group
        ((4, 6, 1, 1), (4,), False),
        ((5, 3, 1, 1), (5,), False),  # no multiple of the groups
        ((4, 3, 1, 1), (1,), False),
        ((4, 3, 1), (4,), False),
    ],
)
def test_what_it_fits(parts, weight, bias, fits):
    bias = None if bias is None else torch.zeros(bias)
    assert Correction.of(parts).fits(torch.zeros(weight), bias) == fits


@pytest.mark.parametrize(
    'parts',
    [
        dict(weight=torch.rand(2, 3, 2)),
        dict(weight=torch.rand(3, 3)),
        dict(weight=torch.rand(0, 3, 3)),
        *(LOW | dict([change]) for change in (('scale', torch.rand(1)), ('down', torch.rand(2, 2, 3)))),
        LOW | dict(up=torch.rand(2, 3)),
        FULL | dict(bias=torch.rand(3)),
    ],
)
def test_parts_that_do_not_fit_each_other(parts):
    assert not Correction.of(parts).fits(torch.zeros(4, 3, 1, 1), None)


@pytest.mark.parametrize('timestep', [1, 40, 999])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('rank', [None, 2])
def test_curvature_is_a_bound(rank, groups, timestep):
    """It is at least the largest eigenvalue of the Gauss-Newton matrix 2 J^T J, and about its trace at most."""
    torch.manual_seed(0)
    layer = denoised(nn.Conv2d(8, 4, 1, groups=groups).double(), rank, timestep=timestep)
    vectors = Sample()(layer, torch.randn(3, 8, 2, 2, dtype=torch.float64) + 0.5)
    parameters = {name: p.detach() for name, p in layer.denoiser.named_parameters()}
    step, eye = layer.reverse_step, torch.eye(8 // groups, dtype=torch.float64)

    def residuals(*values):
        """Returns all terms whose squares add up to the loss."""
        part = dict(zip(parameters, values, strict=True))
        matrix = part['weight'] if rank is None else part['scale'][:, None, None] * eye + part['up'] @ part['down']
        prediction = (matrix + step.c3_minus_1 * eye) / step.c1
        errors = step.signal * prediction @ vectors + part['bias'].view(groups, -1, 1) / step.c1
        rest = eye - step.noise * prediction
        return torch.cat([errors.flatten() / errors[0, 0].numel() ** 0.5, rest.flatten()]) / 8**0.5

    values, correction = tuple(parameters.values()), Correction.of(parameters)
    torch.testing.assert_close(
        residuals(*values).square().sum(), correction.losses(vectors, step).mean(), rtol=1e-10, atol=0
    )
    jacobian = torch.cat([j.flatten(1) for j in torch.autograd.functional.jacobian(residuals, values)], 1)
    largest = 2 * torch.linalg.matrix_norm(jacobian, 2) ** 2
    bound = correction.curvatures(vectors, step).amax() / groups
    assert largest <= bound * (1 + 1e-9)
    assert bound <= 3 * jacobian.square().sum()

"""Gathers what flows through the layers of a model, whatever a model calls and a batch is."""

import copy

import pytest
import torch
from torch import nn

from calibration_helpers import CLEAN, LAYERS, Branch, Experts, Loop, Recurrent, built, data, fit, gather, supporting
from helpers import copied, equal, relative
from mmdenoiserep.core import Moments, apply_denoiserep, collect_moments, select_layers, solve_denoisers


def seen_by(model, names, batches):
    """Returns all inputs and outputs of layers by name, as a plain loop with hooks gathers them."""
    seen, model = {}, copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: seen.setdefault(name, []).append((args[0], output))
        )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return seen


def test_layers_gather_what_flows_through_them():
    """Inputs of Linear layers, outputs of convolutions; groups are apart; the order is that of execution."""
    model = built().train()
    moments = gather(model, CLEAN[:1])
    assert model.training and list(moments) == LAYERS
    for name, ((x, output),) in seen_by(model.eval(), LAYERS, CLEAN[:1]).items():
        groups = {'conv2': 2, 'conv3': 8}.get(name, 1)
        features = output.movedim(1, -1).flatten(0, 2) if name.startswith('conv') else x.flatten(0, 1)
        expected = Moments.of(features.mT.reshape(groups, -1, len(features)))
        assert moments[name].count == expected.count
        assert relative(moments[name].mean, expected.mean) < 1e-9
        assert relative(moments[name].covariance, expected.covariance) < 1e-9
    assert relative(gather(model, CLEAN[:1], inputs=True)['conv1'].mean, CLEAN[0].mean((0, 2, 3))[None]) < 1e-12


def test_a_part_of_the_tokens_is_drawn_the_same_way_every_time():
    part, again, whole = (gather(built(), CLEAN, stride=stride) for stride in (5, 5, 1))
    for name, moments in part.items():
        assert 0 < moments.count <= whole[name].count / 4
        assert torch.equal(moments.scatter, again[name].scatter)
    assert relative(part['fc1'].mean, whole['fc1'].mean) < 0.5


@pytest.mark.parametrize(
    ('make', 'batches'),
    [
        (Branch, [data(2, 5, 8), *(data(2, 6, 8, seed=i) for i in range(4))]),
        (Branch, [data(2, 6, 8), data(2, 5, 8), data(2, 9, 8)]),
        (Loop, [-data(2, 4, 8).abs(), data(3, 4, 8).abs(), -data(2, 4, 8).abs()]),
        (Experts, [data(5, 2, 8, seed=i) * 2 for i in range(4)]),
        (lambda: Recurrent(True), [data(4, 8), data(3, 8, seed=1)]),
    ],
)
@pytest.mark.parametrize('inputs', [False, True])
def test_moments_are_of_the_first_call_or_of_all_calls_in_all_batches(make, batches, inputs):
    """What a domain fit acts on; what denoisers are solved for."""
    model = built(make)
    example = torch.cat([data(1, 6, 8, seed=i) * 2 for i in range(9)]) if make is Experts else batches[-1]
    layers = select_layers(model, example_input=example)
    moments = collect_moments(model, layers, iter(batches), inputs=inputs)
    seen = {name: [] for name in layers}
    for batch in batches:
        for name, calls in seen_by(model, layers, [batch]).items():
            seen[name] += [x.reshape(-1, 8) for x, _ in (calls if inputs else calls[:1])]
    for name, parts in seen.items():
        x = torch.cat(parts or [data(0, 8)])
        assert moments[name].count == len(x), name
        if len(x):
            assert relative(moments[name].mean[0], x.mean(0)) < 1e-9
            assert relative(moments[name].covariance[0], torch.cov(x.mT, correction=0)) < 1e-9


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, batch):
        return self.f(torch.as_tensor(batch['x'])) * batch['t']


@pytest.mark.parametrize('make', [lambda x: dict(t=torch.tensor(0.5), x=x), lambda x: dict(t=0.5, x=x.tolist())])
def test_batches_that_are_no_tensor(make):
    plain = built(Dicts, torch.float32)
    model = copy.deepcopy(plain)
    source = gather(model, [make(data(9, 8).float()), make(data(5, 8, seed=1).float())])
    assert source['f'].count == 14
    target = make(data(30, 8, noisy=True).float())
    with supporting():
        assert fit(model, [target], source).images == 30
    expected = plain.f.weight.double() @ source['f'].mean[0] + plain.f.bias.double()
    assert relative(model(target).mean(0) / 0.5, expected.float()) < 1e-4, 'the mean is that of the source'


def test_no_layer_and_no_image_are_refused():
    model = built()
    with pytest.raises(ValueError, match='no layer'):
        collect_moments(model, {}, CLEAN)
    for batches in ([], [CLEAN[0][:0]]):
        with pytest.raises(ValueError, match='no image'):
            collect_moments(model, dict(conv1=model.conv1), batches)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 3e38])
@pytest.mark.parametrize('chunks', [1, 2])
def test_features_that_are_not_finite_are_refused_by_name(bad, chunks):
    """By all that gathers moments; nothing becomes of the weights."""
    model, images = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), data(60, 8, dtype=torch.float32)
    source, before = gather(model, [images]), copied(model.state_dict())
    denoised = copy.deepcopy(model)
    apply_denoiserep(denoised, 'all', example_input=images)
    images[3, 2] = bad
    batches = images.chunk(chunks)
    for refused in (
        lambda: gather(model, batches),
        lambda: fit(model, batches, source),
        lambda: solve_denoisers(denoised, batches),
    ):
        with pytest.raises(ValueError, match='features of 0 hold NaN or Inf'):
            refused()
    assert equal(model.state_dict(), before)
    assert all(value.isfinite().all() for value in denoised.state_dict().values())

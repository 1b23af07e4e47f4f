"""The candidates of a fit: which layers each has, and the values of their tensors."""

from copy import deepcopy

import pytest
import torch

from calibration_helpers import LAYERS, Net, data, fit, gather
from helpers import copied
from mmdenoiserep.apis.candidates import CANDIDATES, HALF_STRENGTH, PARTS, Candidates, layers_of

CLEAN = [data(100, 3, 6, 6, seed=seed) for seed in (20, 21)]
BLURRED = [x + x.roll(1, 2) + x.roll(1, 3) + 0.5 for x in (data(100, 3, 6, 6, seed=seed) for seed in (22, 23))]


def fitted(names=LAYERS, images=BLURRED):
    """Returns a model in float64 before and after the fit of some layers, and the candidates."""
    torch.manual_seed(0)
    model = Net().double().eval()
    source = gather(model, CLEAN)
    before = deepcopy(model)
    candidates = Candidates(model, {name: model.get_submodule(name) for name in names})
    fit(model, images, source, names, progress=candidates.note)
    return before, model, candidates


def distance(state, other):
    return max((value - other[key]).abs().max().item() for key, value in state.items() if value.is_floating_point())


def test_parts_of_the_layers():
    """Half of an odd number has the middle one."""
    layers = dict.fromkeys('abcde')
    parts = [''.join(layers_of(layers, part)) for part in PARTS]
    assert parts == ['a', 'abc', 'abcde'] and list(layers_of(dict(a=1, b=2), 'early')) == ['a']


@pytest.mark.parametrize(('name', 'names'), [('first', LAYERS[:1]), ('early', LAYERS[:3]), ('all', LAYERS)])
def test_a_candidate_is_the_fit_of_its_layers(name, names):
    """With what norms take of layers without a bias: a BatchNorm's running mean, a LayerNorm's bias."""
    before, model, candidates = fitted()
    assert candidates.names(name) == names
    candidates.apply('nothing')
    assert distance(model.state_dict(), before.state_dict()) == 0
    candidates.apply(name)
    _, expected, _ = fitted(names)
    assert distance(model.state_dict(), expected.state_dict()) < 1e-9
    assert distance(model.state_dict(), before.state_dict()) > 1e-3
    owners = {layer: {candidates.owned[number][0] for number in changed} for layer, changed in candidates.after.items()}
    assert owners['conv1'] == {'conv1', 'bn1'} and owners['conv3'] == {'conv3', 'bn3'}
    assert owners['fc1'] == {'fc1', 'norm'} and owners['conv2'] == {'conv2'}


def test_equal_candidates_are_looked_at_once():
    before, model, candidates = fitted()
    assert candidates.twins() == {name: name for name in CANDIDATES}
    for name in (LAYERS[0], *LAYERS[3:]):
        candidates.after[name] = {}  # nothing had support there
    assert [*candidates.twins().values()] == ['nothing', 'nothing', 'early', 'early', HALF_STRENGTH]
    assert {*Candidates(before, dict(before.named_children())).twins().values()} == {'nothing'}


def test_half_strength_is_the_mean_of_the_weights():
    before, model, candidates = fitted()
    everything = copied(model.state_dict())
    candidates.apply('first')
    candidates.apply(HALF_STRENGTH)
    start = before.state_dict()
    assert distance(everything, start) > 1e-3
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, torch.lerp(start[key].double(), everything[key].double(), 0.5).to(value))


def test_another_pass_replaces_the_first_one():
    before, model, candidates = fitted()
    expected = copied(model.state_dict())
    candidates.apply('nothing')
    fit(model, [2 * image for image in BLURRED], gather(before, CLEAN), progress=candidates.note)
    candidates.apply('nothing')
    fit(model, BLURRED, gather(before, CLEAN), progress=candidates.note)
    candidates.apply('nothing')
    candidates.apply('all')
    assert distance(model.state_dict(), expected) == 0

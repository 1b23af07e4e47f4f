"""The layers of a plain model that can be fitted: in the order of execution, without a change to the model."""

import copy

import pytest
import torch
from torch import nn

from mmdenoiserep.core import apply_denoiserep, fuse_model, select_layers

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Registers its layers against the order of execution; one of them never runs, one is read by its parent."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.read, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.mlp(torch.relu(self.stem(x)).mean((2, 3)))
        return self.head(x @ self.read.weight)


@pytest.mark.parametrize(
    ('targets', 'exclude', 'names'),
    [
        ('all', (), ['stem', 'mlp.0', 'mlp.2', 'head']),
        ('linear', (), ['mlp.0', 'mlp.2', 'head']),
        ('conv2d', (), ['stem']),
        (['head', r'mlp\.2'], (), ['mlp.2', 'head']),
        ('all', 'stem', ['mlp.0', 'mlp.2', 'head']),
        ('all', ['head', r'mlp\..*'], ['stem']),
    ],
)
def test_layers_by_name_in_the_order_of_execution(targets, exclude, names):
    """They are the layers themselves, those that a conversion takes, and the model stays as it was."""
    model = Net()
    before, attributes = copy.deepcopy(model.state_dict()), {m: dict(m.__dict__) for m in model.modules()}
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    layers = select_layers(model, targets, exclude, X)
    assert list(layers) == names
    assert all(layer is model.get_submodule(name) for name, layer in layers.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.__dict__ == attributes[module] and module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state) and hooks == [len(m._forward_hooks) for m in model.modules()]
    assert [row.name for row in apply_denoiserep(model, targets, exclude, example_input=X).layers] == names


def test_a_model_that_cannot_be_run_keeps_the_order_of_registration():
    assert list(select_layers(Net(), 'linear', ['read', 'unused'], torch.zeros(3))) == ['head', 'mlp.0', 'mlp.2']


@pytest.mark.parametrize(
    ('make', 'options', 'message'),
    [
        (Net, dict(targets='hea'), "'hea' matches no layer .* near names: head"),
        (Net, dict(targets='unused'), 'not executed'),
        (Net, dict(targets='read'), 'bypassed'),
        (Net, dict(exclude='tail'), "'tail' of exclude matches no layer"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, 'lazy parameters'),
    ],
)
def test_what_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        select_layers(make(), example_input=X, **options)


def test_a_model_with_denoisers_is_refused_until_it_is_fused():
    model = Net()
    apply_denoiserep(model, 'head', example_input=X)
    with pytest.raises(ValueError, match='fuse_model'):
        select_layers(model, 'conv2d', example_input=X)
    assert list(select_layers(fuse_model(model), 'conv2d', example_input=X)) == ['stem']

"""How much memory a paused forward holds, on models whose answer is known by hand."""

import pytest
import torch
from torch import nn

from mmdenoiserep.core.calibration.memory import paused_bytes


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 40)

    def forward(self, x):
        y = self.a(x)
        z = torch.tanh(y)  # y is held for the sum, z for b
        y = y + self.b(z)
        del z
        return self.c(y)


def layers_of(model, *names):
    return {name: model.get_submodule(name) for name in names}


@pytest.mark.parametrize(
    ('names', 'floats'),
    [
        ('a', 10),  # the image
        ('ab', 10 + 20 + 20),  # the image, y, z
        ('abc', 10 + 20 + 20),
        ('c', 10 + 20),  # the image, the new y
    ],
)
def test_what_a_paused_forward_holds(names, floats):
    """At the largest layer; the image counts, and weights do not."""
    model = Residual()
    assert paused_bytes(model, layers_of(model, *names), torch.randn(1, 10)) == floats * 4
    assert paused_bytes(model.double(), layers_of(model, *names), torch.randn(3, 10).double()) == 3 * floats * 8


def test_views_count_once_and_what_is_let_go_does_not():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            x = torch.relu(torch.relu(x) + 1)  # two of three are let go
            return self.fc(x.reshape(-1, 6)[:1].expand(4, -1))

    model, batch = Views(), torch.randn(8, 12)
    assert paused_bytes(model, layers_of(model, 'fc'), batch[:2]) == 2 * 24 * 4
    assert all('forward' not in layer.__dict__ for layer in model.modules())


@pytest.mark.parametrize(('stride', 'floats'), [(1, 50 + 6 * 9), (4, 50 + 6 * 3)])
def test_the_sampled_vectors_of_a_layer_count(stride, floats):
    """Those of a convolution are what it returns."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten())
    assert paused_bytes(model, layers_of(model, '0'), torch.randn(1, 2, 5, 5), stride) == floats * 4
    assert paused_bytes(model, layers_of(model, '0'), torch.randn(1, 2, 5, 5), {'0': stride}) == floats * 4

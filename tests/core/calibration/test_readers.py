"""Who reads what while a model runs: what a fit may move a constant into, and whose weight it must leave alone."""

import copy
import dataclasses
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calibration_helpers import PIXELS, TOKENS, built, changed, data, fit, gap, gather, notes, with_maps
from helpers import relative
from mmdenoiserep.core.calibration.readers import find_sole_readers


class Residual(nn.Module):
    """A convolution whose output two read, and a BatchNorm that two convolutions feed."""

    def __init__(self):
        super().__init__()
        for name in ('conv', 'left', 'right', 'alone'):
            self.add_module(name, nn.Conv2d(3, 3, 1, bias=False))
        for name in ('norm', 'both', 'own'):
            self.add_module(name, nn.BatchNorm2d(3))

    def forward(self, x):
        x = self.conv(x)
        x = x + self.norm(x)
        x = self.both(self.left(x)) + self.both(self.right(x))
        return self.own(self.alone(x))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


@pytest.mark.parametrize(('make', 'expected'), [(Residual, {'alone': 'own'}), (Both, {})])
def test_who_feeds_whom_is_seen_in_the_execution(make, expected):
    """An output that the model returns is read by the user too."""
    net = make().eval()
    layers = {name: layer for name, layer in net.named_modules() if name}
    assert find_sole_readers(net, layers, torch.randn(1, 3, 4, 4)) == expected
    assert all('forward' not in layer.__dict__ for layer in net.modules())


def test_a_replaced_forward_stays():
    net = built(lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    net[0].forward = mine = lambda x: x
    find_sole_readers(net, {'norm': net[0], 'fc': net[1]}, data(1, 8))
    assert net[0].forward is mine


class Again(nn.Module):
    """Reads the output of a norm, or the weight of a layer, once more where there are many tokens or bright images."""

    def __init__(self, what, few, bright):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.what, self.few, self.bright = what, few, bright

    def forward(self, x):
        y = self.norm(x)
        z = self.out(torch.relu(self.fc(y)))
        if x.shape[1] <= self.few and x.max() < self.bright:
            return z
        return z + (F.linear(z, self.out.weight) if self.what == 'weight' else y)


SMALL, LARGE, BRIGHT = (data(16, count, 8, noisy=True) for count in (5, 9, 5))
BRIGHT[3] += 60


@pytest.mark.parametrize('what', ['output', 'weight'])
@pytest.mark.parametrize(
    ('few', 'bright', 'batches'),
    [
        pytest.param(5, 99, [SMALL, LARGE], id='a later batch shows it'),
        pytest.param(99, 50, [BRIGHT], id='the first image does not show it'),
    ],
)
def test_a_second_reader_that_not_every_image_shows(what, few, bright, batches):
    """What the batches show beyond the first image undoes the pass, and another one follows."""
    model = built(lambda: Again(what, few, bright))
    plain = copy.deepcopy(model)
    report = fit(model, batches, gather(model, [data(16, *TOKENS)]))
    if what == 'weight':
        assert report.skipped.keys() == {'out'} and 'outside' in report.skipped['out']
        assert not changed(model, plain) & {'out.weight', 'out.bias'}
    else:
        assert notes(report).keys() == {'fc'} and 'norm.bias' not in changed(model, plain)
    x = batches[-1]
    assert relative(model(x).detach(), with_maps(plain, report, x)) < 1e-9


@dataclasses.dataclass
class Result:
    last: torch.Tensor
    hidden: torch.Tensor


class Plain:
    def __init__(self, last, hidden):
        self.last, self.hidden = last, hidden


class Slotted:
    __slots__ = ('hidden', 'last')

    def __init__(self, last, hidden):
        self.last, self.hidden = last, hidden


class Mapped(UserDict):
    """As the outputs of transformers: a mapping that is no dict."""

    def __init__(self, last, hidden):
        super().__init__(last=last, hidden=hidden)
        self.last = last


class Lazy:
    def __init__(self, last, hidden):
        self.last, self.hidden = last, lambda: hidden


class Returns(nn.Module):
    """Returns what a convolution without bias gives, beside what the BatchNorm behind it makes of it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.out = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.kind(self.out(torch.relu(self.norm(y))), y)


@pytest.mark.parametrize('kind', [Result, Plain, Slotted, Mapped, Lazy])
def test_an_output_object_hides_no_reader(kind):
    difference, report = gap(lambda: Returns(kind), PIXELS)
    assert difference < 1e-9 and notes(report).keys() == {'conv'}


class Keeps(Returns):
    """Keeps a feature on itself, as models for distillation do."""

    def forward(self, x):
        self.feature = self.conv(x)
        return self.out(torch.relu(self.norm(self.feature)))


class Cycles(Returns):
    """Leaves a reference cycle that holds a feature, which nobody can read."""

    def forward(self, x):
        y = self.conv(x)
        cycle = [y]
        cycle.append(cycle)
        return self.out(torch.relu(self.norm(y)))


@pytest.mark.parametrize(('make', 'noted'), [(Keeps, {'conv'}), (Cycles, set())])
def test_a_feature_that_the_model_keeps_is_read_by_others(make, noted):
    difference, report = gap(lambda: make(None), PIXELS)
    assert difference < 1e-9 and notes(report).keys() == noted

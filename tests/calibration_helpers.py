"""Models and features that the tests of the calibration share."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from helpers import randomise, relative
from mmdenoiserep.core import Support, collect_moments, explicit_maps, fit_domain, select_layers
from mmdenoiserep.core.calibration import domain

TOKENS, PIXELS = (5, 8), (8, 6, 6)


def data(*shape, seed=0, noisy=False, dtype=torch.float64):
    """Random features; noisy ones have another mean and variance."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 1.5 + 0.5 if noisy else x).to(dtype)


def vectors(groups=2, size=3, count=500, seed=0):
    """Correlated vectors with a mean, (groups, size, count)."""
    mixing, x, mean = (data(groups, size, n, seed=seed + i) for i, n in ((100, size), (200, count), (300, 1)))
    return mixing @ x + 3 * mean


def clusters(shares, images, seed, draw=0, size=8, count=6):
    """Images of several classes, (images, count, size), in shares of all; another draw shows others of the same."""
    classes = 1.5 * data(len(shares), 1, size, seed=seed)
    mixing = data(size, size, seed=seed + 1) / size**0.5
    numbers = (images * torch.tensor(shares)).round().long()
    images = torch.repeat_interleave(classes, numbers, 0)
    own = data(len(images), 1, size, seed=1000 * draw + seed + 2)
    return images + 0.5 * own + data(len(images), count, size, seed=1000 * draw + seed + 3) @ mixing


def gather(model, batches, example=None, **options):
    """Returns the moments of all layers of a plain model; the first batch, or an example, shows what runs."""
    layers = select_layers(model, example_input=batches[0] if example is None else example)
    return collect_moments(model, layers, batches, **options)


def fit(model, batches, source, names=None, **options):
    """Fits layers of a plain model, by default those that the source has moments of; returns the report with maps."""
    layers = {name: model.get_submodule(name) for name in (source if names is None else names)}
    return fit_domain(model, layers, batches, source, **{'maps': True, **options})


@contextmanager
def supporting(covariance=1.0, mean=1.0):
    """Fits at full strength, as if the images supported this share of any difference: tests of where a map goes."""
    with (
        patch.object(domain, 'find_support', lambda *_: Support(covariance, mean)),
        patch.object(domain, 'STRENGTH', 1),
    ):
        yield


def with_maps(model, report, *inputs):
    """Returns what a model before the fit returns with the fitted maps as steps of their own."""
    with torch.no_grad(), explicit_maps(model, {row.name: (row.linear, row.constant) for row in report.layers}):
        return model(*inputs)


def changed(model, before):
    """Returns the names of what differs between a model and an earlier one."""
    state = before.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


def notes(report):
    return {row.name: row.note for row in report.layers if row.note}


class Net(nn.Module):
    """Convolutions with and without bias, groups and BatchNorm; Linear layers with and without bias and LayerNorm."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 12, bias=False)
        self.fc2 = nn.Linear(12, 5)
        self.fc3 = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.tanh(self.conv2(x))
        x = (x + self.bn3(self.conv3(x))).flatten(2).mT
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(self.norm(x))))))


LAYERS = ['conv1', 'conv2', 'conv3', 'fc1', 'fc2', 'fc3']
"""Those of :class:`Net`, first executed first."""

CLEAN = [data(8, 3, 6, 6, seed=seed) for seed in range(3)]
NOISY = [x + 0.7 * data(8, 3, 6, 6, seed=9 + seed) + 0.3 for seed, x in enumerate(CLEAN)]


def built(make=Net, dtype=torch.float64):
    """Returns a model of random parameters; built anew, for a copy would untie parameters, as ``.to(dtype)`` would."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad():
            model = randomise(make())
    finally:
        torch.set_default_dtype(torch.float32)
    model.eval()
    return model


def gap(make, shape, dtype=torch.float64, batches=1, example=None):
    """Fits a model to the whole difference and compares it with the maps as steps of their own.

    Returns:
        The relative difference, and the report.
    """
    model, fitted = built(make, dtype), built(make, dtype)
    clean, noisy, x = (data(16, *shape, seed=seed, noisy=seed > 1, dtype=dtype) for seed in (1, 2, 3))
    source = gather(fitted, [clean], data(1, *(example or shape), dtype=dtype))
    with supporting():
        report = fit(fitted, list(noisy.chunk(batches)), source)
    with torch.no_grad():
        before, expected, actual = map(output_of, (model(x), with_maps(model, report, x), fitted(x)))
    assert relative(before, expected) > 1e-2
    return relative(actual, expected), report


def output_of(output):
    """Returns the tensor that a model of these tests returns, perhaps in an object."""
    return output if isinstance(output, torch.Tensor) else output.last


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.o(self.a(x) + (self.b(x) if x.shape[1] > 5 else 0))


class Loop(nn.Module):
    """Layers that run as often as the content asks for, 1 to 3 times."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(1 + int(x[0, 0, 0] > 0) + int(x[0, 0, 1] > 0)):
            x = torch.tanh(self.a(x))
        return self.o(x)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.o = nn.Linear(8, 8)

    def forward(self, x):
        chosen, y = torch.tensor([self.choose(image) for image in x]), torch.empty_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                y[chosen == number] = expert(x[chosen == number])
        return self.o(y)

    def choose(self, image):
        return int(image[0, 0] > 0) + int(image[0, 0] > 2)


class Recurrent(nn.Module):
    """A layer that runs twice, with other values the second time."""

    def __init__(self, more=False):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.o = nn.Linear(8, 8) if more else None

    def forward(self, x):
        x = self.a(3 * torch.tanh(self.a(x)) + 1)
        return self.o(torch.relu(x)) if self.o else x


class Second(nn.Module):
    """The first layer runs again if there are several images, which one image does not show."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(self.b(self.a(x)))
        return self.c(self.a(x) if len(x) > 1 else x)

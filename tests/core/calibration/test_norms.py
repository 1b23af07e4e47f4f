"""Norms that take the constant of a layer without a bias, and those that can't."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from mmpretrain.models.utils import LayerNorm2d
from torch import nn
from torch.nn.utils import parametrize, prune

from calibration_helpers import CLEAN, PIXELS, TOKENS, built, changed, data, fit, gap, gather, notes, supporting
from helpers import relative
from mmdenoiserep.core.calibration.moments import RIDGE


class Activated(nn.LayerNorm):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Detached(nn.LayerNorm):
    """A subclass that changes nothing: what it does is not known, so it is not used."""


class Skip(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1))


def before_linear(norm):
    return lambda: nn.Sequential(norm(8), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8))


def behind_convolution(norm):
    return lambda: nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def check(make, shape, batches=1, layer=None, word=''):
    """Fits a model; the layer is the only one whose constant no norm takes, and a note names the reason."""
    difference, report = gap(make, shape, batches=batches)
    assert difference < 1e-9
    assert notes(report).keys() == ({layer} if layer else set())
    assert all(word in note for note in notes(report).values())


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize('norm', [nn.LayerNorm, Activated, Scaled, Detached])
def test_layer_norms_by_exact_class(norm, batches):
    check(before_linear(norm), TOKENS, batches, None if norm is nn.LayerNorm else '1', norm.__name__)


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm, Skip, Clamped])
def test_batch_norms_by_exact_class(norm, batches):
    check(behind_convolution(norm), PIXELS, batches, '0' if norm in (Skip, Clamped) else None, norm.__name__)


@pytest.mark.parametrize('norm', [_BatchNormXd, SyncBatchNorm])
def test_the_norms_of_openmmlab_are_known(norm):
    check(behind_convolution(norm), PIXELS)


def test_channels_that_the_layer_does_not_read():
    check(before_linear(LayerNorm2d), (8, 8, 8), layer='1', word='LayerNorm2d')


def test_the_norms_of_timm_are_known():
    layers = pytest.importorskip('timm.layers')
    check(behind_convolution(layers.BatchNormAct2d), PIXELS)
    check(before_linear(layers.LayerNorm), TOKENS)
    check(before_linear(layers.LayerNormAct), TOKENS, layer='1')


def rewrite_bias(layer, args):
    with torch.no_grad():
        layer.bias.copy_(layer.weight * 0.3)


class Read(nn.Module):
    """A LayerNorm before a Linear layer without bias; something else has to do with its bias."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        nn.init.normal_(self.norm.bias)
        if how == 'shared':
            self.other.bias = self.norm.bias
        elif how == 'tied':  # another parameter in the same memory
            self.other.bias = nn.Parameter(self.norm.bias.data)
        elif how == 'flat':  # as optimizers with one buffer lay parameters out
            flat = torch.randn(16)
            self.norm.bias, self.other.bias = nn.Parameter(flat[:8]), nn.Parameter(flat[8:])
        elif how == 'pruned':
            prune.random_unstructured(self.norm, 'bias', 0.5)
        elif how == 'parametrised':
            parametrize.register_parametrization(self.norm, 'bias', nn.Tanh())
        elif how == 'hook':
            self.norm.register_forward_hook(lambda layer, args, output: torch.tanh(output))
        elif how == 'pre-hook':
            self.norm.register_forward_pre_hook(rewrite_bias)
        elif how == 'stash':
            self.kept = self.norm.bias.detach()

    def forward(self, x):
        y = self.norm(x)
        z = self.out(torch.relu(self.fc(y)))
        if self.how == 'functional':
            z = z + F.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
        elif self.how == 'view':
            z = z + self.norm.bias.view(2, 4).flatten() * x
        elif self.how == 'stash':
            z = z * self.kept
        elif self.how == 'residual':
            z = z + y
        elif self.how in ('shared', 'tied', 'flat'):
            z = z + self.other(x)
        return z


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize(
    'how', ['shared', 'tied', 'functional', 'view', 'stash', 'residual', 'pruned', 'parametrised', 'hook', 'pre-hook']
)
def test_the_bias_of_a_norm_that_others_have_to_do_with(how, batches):
    """Nothing takes the constant, and nothing else changes."""
    check(lambda: Read(how), TOKENS, batches, 'fc')


@pytest.mark.parametrize('how', ['', 'flat'])
def test_a_norm_of_its_own_takes_the_constant(how):
    """Two parameters in one buffer share no memory."""
    check(lambda: Read(how), TOKENS)


class Statistics(nn.Module):
    """A BatchNorm whose running mean another BatchNorm has as well, or the model reads."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.norm, self.twin = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 4, 1)
        if how == 'shared':
            self.twin.running_mean = self.norm.running_mean

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.how == 'read':
            y = y + (x - self.norm.running_mean[:, None, None])
        return self.out(torch.relu(y) + self.twin(x))


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize('how', ['', 'shared', 'read'])
def test_the_running_mean_that_others_read(how, batches):
    check(lambda: Statistics(how), PIXELS, batches, 'conv' if how else None)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.fc = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.fc(self.norm(self.bn(self.conv(x)).flatten(2).mT))


def test_norms_that_hold_nothing_take_no_constant():
    torch.manual_seed(0)
    model = Bare().double()
    report = fit(model, [torch.cat(CLEAN) + 1], gather(model, CLEAN))
    assert notes(report).keys() == {'conv', 'fc'}


class Mixed(nn.Module):
    """Norms that stand where none of their kind can help: behind a Linear layer, and before a convolution."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8, bias=False)
        self.bn = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x):
        return self.conv(self.norm(self.bn(self.fc(x)))[..., None, None])


def test_a_norm_of_the_wrong_kind_takes_no_constant():
    """A BatchNorm has no bias on the input of a Linear layer, a LayerNorm no running mean on a convolution's output."""
    model, clean = built(Mixed), data(200, 6)
    with supporting():
        report = fit(model, [clean * 2 + 3], gather(model, [clean]))
    assert notes(report).keys() == {'fc', 'conv'}
    assert changed(model, built(Mixed)) == {'fc.weight', 'conv.weight'}


def test_moments_about_zero_where_nothing_takes_a_constant():
    """``A M_t A^T = M_s`` of second moments M with the ridge, which a map of centred features does not give."""
    clean, bright = data(500, 5) + 1, 0.5 * data(500, 5, seed=1) + 4
    model = built(lambda: nn.Sequential(nn.Linear(5, 3, bias=False)))
    source = gather(model, [clean])['0'].about_zero()
    with supporting():
        (row,) = fit(model, [bright], gather(model, [clean])).layers
    ridge = RIDGE * source.variance * torch.eye(5)
    expected, before = ((x.mT @ x / len(x) + ridge)[None] for x in (clean, bright))
    assert relative(row.linear @ before @ row.linear.mT, expected) < 1e-9
    assert not row.constant.any() and relative(before, expected) > 1

"""A domain fit is exact or says what it leaves out: odd layers, odd norms, outputs that others read."""

import copy
import dataclasses
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from helpers import randomise, relative
from mmdenoiserep.core import apply_denoiserep, calibrate, collect_moments, explicit_maps, fuse_model, verify_fusion

TOKENS, PIXELS = (5, 8), (8, 6, 6)


def data(shape, count=16, seed=0, noisy=False, dtype=torch.float64):
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 1.5 + 0.5 if noisy else x).to(dtype)


def built(make, dtype):
    """Returns a model of random parameters; built anew, for a copy would untie parameters, as ``.to(dtype)`` would."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad():
            return randomise(make()).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def gap(make, shape, dtype=torch.float64, batches=1, example=None):
    """Fits a model and compares it with the maps as layers of their own; the fit has to do something."""
    model, fitted = built(make, dtype), built(make, dtype)
    apply_denoiserep(fitted, 'all', example_input=data(example or shape, 1, dtype=dtype))
    source = collect_moments(fitted, [data(shape, seed=1, dtype=dtype)])
    images = list(data(shape, seed=2, noisy=True, dtype=dtype).chunk(batches))
    report = calibrate(fitted, images, 'domain', source)
    x = data(shape, seed=3, noisy=True, dtype=dtype)
    with torch.no_grad():
        before = tensor_of(model(x))
        with explicit_maps(model, {row.name: (row.linear, row.constant) for row in report.layers}):
            expected = tensor_of(model(x))
        assert relative(before, expected) > 1e-2
        return relative(tensor_of(fuse_model(fitted)(x)), expected), report


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output.last


def notes(report):
    return {row.name: row.note for row in report.layers if row.note}


# The layers


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('batches', [1, 2])
def test_weight_and_bias_move_together_in_every_dtype(dtype, batches):
    """In float64, ``.double()`` is no copy: the bias must not move with the new weight."""
    makes = {
        (8,): lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        PIXELS: lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8)),
        TOKENS: lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 3)),
    }
    for shape, make in makes.items():
        difference, _ = gap(make, shape, dtype, batches)
        assert difference < (1e-9 if dtype == torch.float64 else 1e-4), shape


def squash(layer, args, output):
    return torch.tanh(output)


class Hooked(nn.Module):
    def __init__(self, hook=squash, pre=None, bias=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, bias=bias), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        if hook:
            self.conv.register_forward_hook(hook)
        if pre:
            self.conv.register_forward_pre_hook(pre)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


def gate(layer, args, output):
    return output * torch.sigmoid(output.mean((2, 3), keepdim=True))


@pytest.mark.parametrize('hook', [squash, gate])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('batches', [1, 2])
def test_a_convolution_with_a_forward_hook(hook, bias, batches):
    difference, report = gap(lambda: Hooked(hook, bias=bias), PIXELS, batches=batches)
    assert difference < 1e-9
    assert notes(report).keys() == (set() if bias else {'conv'}), 'behind the hook, no norm can take the constant'


class HookedLinear(nn.Module):
    """A scale in a forward pre-hook, as quantisers put it, and a residual in a forward hook, as adapters do."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fc.register_forward_pre_hook(lambda layer, args: (torch.tanh(args[0]) * 2,))
        self.fc.register_forward_hook(lambda layer, args, output: torch.relu(output) + args[0])

    def forward(self, x):
        return self.out(self.fc(self.norm(x)))


def test_a_linear_layer_with_hooks():
    assert gap(HookedLinear, TOKENS)[0] < 1e-9
    assert gap(HookedLinear, TOKENS, batches=2)[0] < 1e-9


class ByForward(nn.Module):
    """Calls layers by ``.forward``, past their hooks, where images are large: the run of a conversion misses that."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        conv, fc = (self.conv.forward, self.fc.forward) if x.shape[-1] > 5 else (self.conv, self.fc)
        return fc(torch.relu(conv(x)).mean((2, 3)))


def test_layers_called_by_forward_are_fitted():
    difference, report = gap(ByForward, PIXELS, example=(8, 5, 5))
    assert difference < 1e-9 and [row.name for row in report.layers] == ['conv', 'fc']


class Branch(nn.Module):
    """Reads the weight of a layer by itself, but only for many tokens."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.fc(x)
        return self.out(torch.relu(F.linear(y, self.fc.weight) if x.shape[1] > 5 else y))


def test_a_weight_that_a_branch_reads_is_left_alone():
    torch.manual_seed(0)
    model = Branch().double()
    apply_denoiserep(model, 'all', example_input=data(TOKENS, 1))
    source = collect_moments(model, [data(TOKENS)])
    before = model.fc.weight.clone()
    report = calibrate(model, [data(TOKENS, noisy=True), data((9, 8), noisy=True)], 'domain', source)
    assert [row.name for row in report.layers] == ['out'] and 'outside' in report.skipped['fc']
    assert 'fc' in str(report) and '1 layers calibrated' in str(report)
    assert torch.equal(model.fc.weight, before)


# Norms that take a constant, and those that can't


class Activated(nn.LayerNorm):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Scaled(nn.LayerNorm):
    """As LayerScale inside of a norm."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class Detached(nn.LayerNorm):
    """A subclass that changes nothing: what it does is not known, so it is not used."""


class Skip(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


class Clamped(nn.BatchNorm2d):
    """As a norm that guards against large values."""

    def forward(self, x):
        return super().forward(x.clamp(-1, 1))


def before_linear(norm):
    return lambda: nn.Sequential(norm(8), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8))


def behind_convolution(norm):
    return lambda: nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize('norm', [nn.LayerNorm, Activated, Scaled, Detached])
def test_layer_norms_by_exact_class(norm, batches):
    difference, report = gap(before_linear(norm), TOKENS, batches=batches)
    assert difference < 1e-9
    if norm is nn.LayerNorm:
        assert not notes(report)
    else:
        assert notes(report).keys() == {'1'} and norm.__name__ in notes(report)['1']


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm, Skip, Clamped])
def test_batch_norms_by_exact_class(norm, batches):
    difference, report = gap(behind_convolution(norm), PIXELS, batches=batches)
    assert difference < 1e-9
    if norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        assert not notes(report)
    else:
        assert notes(report).keys() == {'0'} and norm.__name__ in notes(report)['0']


def test_the_norms_of_openmmlab_are_known():
    from mmengine.model.utils import _BatchNormXd
    from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
    from mmpretrain.models.utils import LayerNorm2d

    for norm in (_BatchNormXd, SyncBatchNorm):
        difference, report = gap(behind_convolution(norm), PIXELS)
        assert difference < 1e-9 and not notes(report)
    square = lambda: nn.Sequential(LayerNorm2d(8), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8))  # noqa: E731
    difference, report = gap(square, (8, 8, 8))
    assert difference < 1e-9 and 'LayerNorm2d' in notes(report)['1'], 'its channels are not what the layer reads'


def rewrite_bias(layer, args):
    with torch.no_grad():
        layer.bias.copy_(layer.weight * 0.3)


def test_the_norms_of_timm_are_known():
    layers = pytest.importorskip('timm.layers')
    difference, report = gap(behind_convolution(layers.BatchNormAct2d), PIXELS)
    assert difference < 1e-9 and not notes(report)
    difference, report = gap(before_linear(layers.LayerNorm), TOKENS)
    assert difference < 1e-9 and not notes(report)
    difference, report = gap(before_linear(layers.LayerNormAct), TOKENS)
    assert difference < 1e-9 and notes(report)


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


@pytest.mark.parametrize(
    'how',
    [
        'shared',
        'tied',
        'functional',
        'view',
        'stash',
        'residual',
        'pruned',
        'parametrised',
        'hook',
        'pre-hook',
    ],
)
def test_the_bias_of_a_norm_that_others_have_to_do_with(how):
    """The constant is left out, and nothing else changes; with one batch and with several."""
    for batches in (1, 2):
        difference, report = gap(lambda: Read(how), TOKENS, batches=batches)
        assert difference < 1e-9 and notes(report).keys() == {'fc'}


def test_a_norm_of_its_own_takes_the_constant():
    """Two parameters in one buffer share no memory."""
    for how in ('', 'flat'):
        difference, report = gap(lambda how=how: Read(how), TOKENS)
        assert difference < 1e-9 and not notes(report)


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


@pytest.mark.parametrize('how', ['', 'shared', 'read'])
def test_the_running_mean_that_others_read(how):
    for batches in (1, 2):
        difference, report = gap(lambda: Statistics(how), PIXELS, batches=batches)
        assert difference < 1e-9 and notes(report).keys() == ({'conv'} if how else set())


class Wide(nn.Module):
    """Reads the output of a norm a second time, but only where there are many tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        z = self.out(torch.relu(self.fc(y)))
        return z + y if x.shape[1] > 5 else z


def test_a_second_reader_in_a_later_batch_is_seen():
    torch.manual_seed(0)
    model = Wide().double()
    before = copy.deepcopy(model)
    apply_denoiserep(model, 'all', example_input=data(TOKENS, 1))
    source = collect_moments(model, [data(TOKENS)])
    report = calibrate(model, [data(TOKENS, noisy=True), data((9, 8), noisy=True)], 'domain', source)
    assert notes(report).keys() == {'fc'} and torch.equal(model.norm.bias, before.norm.bias)
    x = data((9, 8), noisy=True, seed=5)
    with torch.no_grad(), explicit_maps(before, {row.name: (row.linear, row.constant) for row in report.layers}):
        expected = before(x)
    assert relative(fuse_model(model)(x).detach(), expected) < 1e-9


class Bright(nn.Module):
    """Reads the output of a norm, and the weight of a layer, a second time if an image is bright."""

    def __init__(self, weight):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.weight = weight

    def forward(self, x):
        y = self.norm(x)
        z = self.out(torch.relu(self.fc(y)))
        if x.max() < 50:
            return z
        return z + F.linear(z, self.out.weight) if self.weight else z + y


@pytest.mark.parametrize('weight', [False, True])
def test_a_second_reader_that_the_first_image_does_not_show(weight):
    """One batch is fitted in turn; what it shows beyond its first image undoes that, and passes follow."""
    torch.manual_seed(0)
    model = Bright(weight).double()
    before = copy.deepcopy(model)
    apply_denoiserep(model, 'all', example_input=data(TOKENS, 1))
    source = collect_moments(model, [data(TOKENS)])
    images = data(TOKENS, noisy=True)
    images[3] += 60
    report = calibrate(model, [images], 'domain', source)
    assert report.passes == 2
    if weight:
        assert report.skipped.keys() == {'out'} and torch.equal(model.out.weight, before.out.weight)
    else:
        assert notes(report).keys() == {'fc'} and torch.equal(model.norm.bias, before.norm.bias)
    with torch.no_grad(), explicit_maps(before, {row.name: (row.linear, row.constant) for row in report.layers}):
        expected = before(images)
    assert relative(fuse_model(model)(images).detach(), expected) < 1e-9


# Outputs that hide who reads what


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


def test_a_feature_that_the_model_keeps_is_read_by_others():
    difference, report = gap(lambda: Keeps(None), PIXELS)
    assert difference < 1e-9 and notes(report).keys() == {'conv'}
    difference, report = gap(lambda: Cycles(None), PIXELS)
    assert difference < 1e-9 and not notes(report)


def test_maps_run_in_a_model_with_denoisers_too():
    """Also while :func:`verify_fusion` runs them by their definition; afterwards nothing is left on the layers."""
    before = built(lambda: Hooked(gate), torch.float64)
    apply_denoiserep(before, 'all', example_input=data(PIXELS, 1))
    fitted = copy.deepcopy(before)
    source = collect_moments(fitted, [data(PIXELS, seed=1)])
    report = calibrate(fitted, [data(PIXELS, seed=2, noisy=True)], 'domain', source)
    maps = {row.name: (row.linear, row.constant) for row in report.layers}
    assert not verify_fusion(before, fuse_model(fitted), data(PIXELS)).ok
    with explicit_maps(before, maps):
        assert verify_fusion(before, fuse_model(fitted), data(PIXELS)).ok
        with torch.no_grad():
            assert relative(before(data(PIXELS)), fuse_model(fitted)(data(PIXELS))) < 1e-9
    assert all('forward' not in layer.__dict__ and 'forward_plain' not in layer.__dict__ for layer in before.modules())

"""Calibration: moments gathered in pieces, the closed form, and the fit to the domain of unlabelled images."""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from helpers import randomise, relative
from mmdenoiserep.core import (
    DenoiseLayer,
    DenoiseLinear,
    Moments,
    NoiseSchedule,
    apply_denoiserep,
    calibrate,
    closed_form,
    collect_moments,
    fuse_model,
    transport,
)
from mmdenoiserep.core.calibration.readers import find_sole_readers
from mmdenoiserep.core.calibration.collect import Sample


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


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().double().eval()
    for norm in (net.bn1, net.bn3):
        for tensor in (norm.running_mean, norm.weight, norm.bias, norm.running_var):
            tensor.data.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def clean():
    return [torch.randn(8, 3, 6, 6, dtype=torch.float64) for _ in range(3)]


@pytest.fixture
def noisy(clean):
    return [batch + 0.7 * torch.randn_like(batch) + 0.3 for batch in clean]


def denoised(net, targets='all', **options):
    net = copy.deepcopy(net)
    apply_denoiserep(net, targets, example_input=torch.randn(1, 3, 6, 6, dtype=torch.float64), **options)
    return net


def vectors(groups=2, size=3, count=500, dtype=torch.float64):
    """Correlated vectors with a mean, (groups, size, count)."""
    mixing = torch.randn(groups, size, size, dtype=torch.float64)
    x = mixing @ torch.randn(groups, size, count, dtype=torch.float64) + 3 * torch.randn(groups, size, 1)
    return x.to(dtype)


def exact(x):
    """Mean and covariance by their definition."""
    return x.mean(-1), torch.stack([torch.cov(group, correction=0) for group in x.double()])


# Moments


def test_moments_of_pieces_are_those_of_the_whole():
    x = vectors()
    whole, merged = Moments.of(x), Moments(2, 3)
    for piece in x.split([1, 99, 0, 400], -1):
        merged.update(piece)
    halves = Moments.of(x[..., :123])
    halves.merge(Moments.of(x[..., 123:]))
    mean, covariance = exact(x)
    for moments in (whole, merged, halves):
        assert moments.count == 500
        assert relative(moments.mean, mean) < 1e-13 and relative(moments.covariance, covariance) < 1e-13
        assert relative(moments.second_moment, x @ x.mT / 500) < 1e-13


def test_a_large_mean_costs_no_precision():
    """In float64 the naive E[x^2] - E[x]^2 would lose all digits here."""
    x = vectors() + 1e8
    merged = Moments(2, 3)
    for piece in x.split(50, -1):
        merged.update(piece)
    assert relative(merged.covariance, exact(x - 1e8)[1]) < 1e-6


def test_float32_and_half_precision_are_summed_in_float64():
    x = vectors(dtype=torch.float32) + 100
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    assert relative(moments.covariance, exact(x)[1]) < 1e-5
    half = x.to(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative(Moments.of(half).covariance, exact(half)[1]) < 1e-5


def test_moments_come_back_from_a_file(tmp_path):
    moments = Moments.of(vectors())
    torch.save(moments.state_dict(), tmp_path / 'moments.pth')
    back = Moments.from_state_dict(torch.load(tmp_path / 'moments.pth', weights_only=True))
    assert back.count == moments.count
    assert torch.equal(back.mean, moments.mean) and torch.equal(back.scatter, moments.scatter)
    back.update(vectors())
    assert back.count == 1000 and moments.count == 500


@pytest.mark.parametrize('change', [dict(mean=torch.zeros(2, 4)), dict(scatter=torch.full((2, 3, 3), torch.nan))])
def test_damaged_moments_are_refused(change):
    with pytest.raises(ValueError):
        Moments.from_state_dict({**Moments.of(vectors()).state_dict(), **change})


def test_layers_gather_what_flows_through_them(net, clean):
    """Inputs of Linear layers, outputs of convolutions; groups are apart; the order is that of execution."""
    model = denoised(net)
    seen = {}
    for name, layer in model.named_modules():
        if hasattr(layer, 'denoiser'):
            layer.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    model.train()
    moments = collect_moments(model, clean[:1])
    assert model.training and list(moments) == ['conv1', 'conv2', 'conv3', 'fc1', 'fc2', 'fc3']
    for name, (x, out) in seen.items():
        groups = {'conv2': 2, 'conv3': 8}.get(name, 1)
        if name.startswith('conv'):
            flat = out.transpose(0, 1).reshape(groups, 8 // groups, -1)
        else:
            flat = x.reshape(1, -1, x.shape[-1]).mT
        mean, covariance = exact(flat)
        assert relative(moments[name].mean, mean) < 1e-12
        assert (moments[name].covariance - covariance.reshape_as(moments[name].covariance)).abs().max() < 1e-12
    inputs = collect_moments(model, clean[:1], inputs=True)
    assert relative(inputs['conv1'].mean, clean[0].mean((0, 2, 3))[None]) < 1e-12
    whole = collect_moments(model, clean)
    assert whole['fc1'].count == 3 * moments['fc1'].count


def test_a_part_of_the_tokens_is_drawn_the_same_way_every_time(net, clean):
    model = denoised(net)
    part, again = (collect_moments(model, clean, every=5) for _ in range(2))
    whole = collect_moments(model, clean)
    for name, moments in part.items():
        assert 0 < moments.count <= whole[name].count / 4
        assert torch.equal(moments.scatter, again[name].scatter)
    assert relative(part['fc1'].mean, whole['fc1'].mean) < 0.5


# The closed form


def test_the_pixels_that_are_drawn_differ_from_image_to_image():
    """A place in the image is no random sample: what lies there may be the same in all of them."""
    ramp = torch.arange(64.0).reshape(1, 1, 8, 8).expand(500, 1, 8, 8)
    moments = Moments.of(Sample(every=8)(nn.Conv2d(1, 2, 1), ramp))
    assert moments.count == 500 * 8
    assert abs(moments.mean.item() - 31.5) < 1 and abs(moments.covariance.item() / ramp[0].var().item() - 1) < 0.05


def test_a_pass_ends_with_the_last_layer_that_it_gathers(net, clean, noisy):
    model, runs = denoised(net), []
    source = collect_moments(model, clean)
    (*_, last) = source
    handle = model.get_submodule(last).register_forward_hook(lambda *_: runs.append(1))
    report = calibrate(model, noisy, 'domain', source, layers=list(source)[:2])
    handle.remove()
    assert report.passes == 2 and len(runs) == len(noisy), 'the first pass alone runs to its end'


def test_zero_denoisers_are_left_out_of_a_pass_and_others_are_not(net, clean, monkeypatch):
    model, seen = denoised(net), []
    constants = DenoiseLayer._constants
    monkeypatch.setattr(DenoiseLayer, '_constants', lambda self: seen.append(self) or constants(self))
    collect_moments(model, clean[:1])
    assert not seen
    layer = next(module for module in model.modules() if isinstance(module, DenoiseLayer))
    next(layer.denoiser.parameters()).data += 1
    collect_moments(model, clean[:1])
    assert set(seen) == {layer} and 'forward' not in layer.__dict__


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('timestep', [1, 12, 999])
def test_the_closed_form_is_where_lbfgs_ends_and_the_gradient_is_zero(bias, timestep):
    """The loss is steep in B, so L-BFGS works on D, as the loss is written."""
    torch.manual_seed(timestep)
    x = vectors(1, 6, 400)[0].mT
    layer = DenoiseLinear(6, 4, timestep=timestep, denoiser_bias=bias, dtype=torch.float64)
    moments = Moments.of(x.mT[None])
    solution = closed_form(moments.mean, moments.second_moment, layer.reverse_step, bias=bias)
    with torch.no_grad():
        for name, parameter in layer.denoiser.named_parameters():
            parameter.copy_(solution[name])
    best = layer.denoise_loss(x)
    best.backward()
    step = layer.reverse_step
    slope = max(p.grad.abs().max().item() * step.c1 for p in layer.denoiser.parameters())  # with respect to D and d
    assert slope < 1e-9

    d_matrix = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    d_bias = torch.zeros(6, dtype=torch.float64, requires_grad=bias)
    free = [d_matrix, d_bias] if bias else [d_matrix]
    optimizer = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn='strong_wolfe'
    )

    def loss():
        optimizer.zero_grad()
        prediction = step.signal * x @ d_matrix.mT + d_bias
        value = prediction.square().sum(-1).mean() + (torch.eye(6) - step.noise * d_matrix).square().sum()
        (value / 6).backward()
        return value / 6

    for _ in range(20):
        optimizer.step(loss)
    expected = (solution['weight'][0] + step.c3_minus_1 * torch.eye(6)) / step.c1
    assert relative(d_matrix.detach(), expected) < 1e-6
    assert loss().item() == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize('rank', [None, 2])
def test_schedule_mode_sets_the_optimum_of_every_layer(net, clean, rank):
    """No step from there lowers the loss over all inputs, and the report says what the loss is."""
    vanilla = randomise(denoised(net, rank=rank), size=1e-4)
    inputs = {}
    for name, layer in vanilla.named_modules():
        if hasattr(layer, 'denoiser'):
            layer.register_forward_hook(lambda m, args, out, name=name: inputs.setdefault(name, []).append(args[0]))
    for batch in clean:
        vanilla(batch)
    model = randomise(denoised(net, rank=rank), size=1e-4)
    before = {name: model.get_submodule(name).denoise_loss(torch.cat(x)).item() for name, x in inputs.items()}
    report = calibrate(model, clean)
    assert {row.name: row.start for row in report.layers} == pytest.approx(before, rel=1e-9)
    assert [row.name for row in report.layers] == list(inputs) and report.images == 24 and report.passes == 1
    for row in report.layers:
        layer = model.get_submodule(row.name)
        loss = layer.denoise_loss(torch.cat(inputs[row.name]))
        assert loss.item() == pytest.approx(row.loss, rel=1e-9)
        assert row.optimum <= row.loss * (1 + 1e-12) and row.loss < row.start
        if rank is None:
            assert row.loss == pytest.approx(row.optimum, rel=1e-12)
            loss.backward()
            slopes = [p.grad.abs().max() * layer.reverse_step.c1 for p in layer.denoiser.parameters()]
            assert max(slopes) < 1e-9
    assert report.layers[0].name in str(report) and '24 images in 1 pass' in str(report)
    mean = next(line for line in str(report).splitlines() if line.startswith('mean'))
    means = [sum(getattr(row, key) for row in report.layers) / len(inputs) for key in ('start', 'loss', 'optimum')]
    assert mean.split() == ['mean', *(f'{value:.6f}' for value in means)]


def test_pieces_and_the_whole_give_the_same_denoisers(net, clean):
    pieces, whole = denoised(net), denoised(net)
    calibrate(pieces, clean)
    calibrate(whole, [torch.cat(clean)])
    for (name, a), b in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max()), name
    assert any(p.any() for n, p in pieces.named_parameters() if '.denoiser.' in n)


def test_a_prior_keeps_few_images_from_erasing_unseen_directions(clean):
    """Three vectors in 16 dimensions: without a prior, the step halves all that they do not span (t = 1)."""
    model = nn.Sequential(nn.Linear(16, 4)).double()
    few = [torch.randn(3, 16, dtype=torch.float64)]
    shrunk = []
    for prior in (0.0, 100.0):
        copied = copy.deepcopy(model)
        apply_denoiserep(copied, 'all', example_input=few[0])
        calibrate(copied, few, prior=prior)
        shrunk.append(torch.linalg.eigvalsh(copied[0].denoiser.weight[0]).max().item())
    assert shrunk[0] > 0.4 and shrunk[1] < 0.01


# The fit to a domain


def gaussian(covariance, mean, count=200_000):
    root = torch.linalg.cholesky(covariance)
    return (root @ torch.randn(len(mean), count, dtype=torch.float64) + mean[:, None])[None]


def test_gaussian_features_with_known_noise_get_their_clean_moments_back():
    torch.manual_seed(1)
    mixing = torch.randn(5, 5, dtype=torch.float64)
    covariance = mixing @ mixing.T + torch.eye(5)
    mean = torch.randn(5, dtype=torch.float64)
    source = Moments.of(gaussian(covariance, mean))
    noisy = gaussian(covariance + 0.8 * torch.eye(5), mean + 0.5)
    linear, constant = transport(source, Moments.of(noisy))
    back = Moments.of(linear @ noisy + constant[..., None])
    assert relative(back.mean, mean[None]) < 0.02
    assert relative(back.covariance, covariance[None]) < 0.03
    assert relative(Moments.of(noisy).covariance, covariance[None]) > 0.05
    assert relative(linear, linear.mT) < 0.03, 'for noise in all directions, the map shrinks along the eigenvectors'


def test_without_a_ridge_the_moments_are_matched_exactly(monkeypatch):
    monkeypatch.setattr(import_module('mmdenoiserep.core.calibration.match'), 'RIDGE', 0.0)
    source, target = Moments.of(vectors(2, 4)), vectors(2, 4)
    linear, constant = transport(source, Moments.of(target))
    back = Moments.of(linear @ target + constant[..., None])
    assert relative(back.mean, source.mean) < 1e-11 and relative(back.covariance, source.covariance) < 1e-11


@pytest.mark.parametrize('fit', ['full', 'covariance', 'diagonal', 'mean'])
def test_equal_moments_need_no_map(fit):
    moments = Moments.of(vectors())
    linear, constant = transport(moments, moments, fit)
    assert relative(linear, torch.eye(3).expand(2, 3, 3).double()) < 1e-9 and constant.abs().max() < 1e-9


def test_simpler_fits_match_the_mean_and_the_variances(monkeypatch):
    monkeypatch.setattr(import_module('mmdenoiserep.core.calibration.match'), 'RIDGE', 0.0)
    source, x = Moments.of(vectors()), vectors()
    for fit in ('diagonal', 'mean'):
        linear, constant = transport(source, Moments.of(x), fit)
        back = Moments.of(linear @ x + constant[..., None])
        assert relative(back.mean, source.mean) < 1e-9
        off = linear - torch.diag_embed(linear.diagonal(dim1=1, dim2=2))
        assert not off.any()
        if fit == 'diagonal':
            variances = [m.covariance.diagonal(dim1=1, dim2=2) for m in (back, source)]
            assert relative(*variances) < 1e-9
        else:
            assert torch.equal(linear, torch.eye(3).expand(2, 3, 3).double())


def test_a_fit_of_the_covariance_leaves_the_mean(monkeypatch):
    monkeypatch.setattr(import_module('mmdenoiserep.core.calibration.match'), 'RIDGE', 0.0)
    source, x = Moments.of(vectors()), vectors()
    linear, constant = transport(source, Moments.of(x), 'covariance')
    back = Moments.of(linear @ x + constant[..., None])
    assert relative(back.mean, Moments.of(x).mean) < 1e-9 and relative(back.covariance, source.covariance) < 1e-9


def test_a_map_of_low_rank_keeps_the_largest_directions():
    source, target = Moments.of(vectors(1, 8)), Moments.of(vectors(1, 8))
    full, _ = transport(source, target)
    low, constant = transport(source, target, rank=3)
    change = (low - torch.eye(8))[0]
    assert torch.linalg.matrix_rank(change) == 3
    values = torch.linalg.svdvals(full[0] - torch.eye(8))
    torch.testing.assert_close(torch.linalg.svdvals(full[0] - low[0])[0], values[3])
    torch.testing.assert_close((low @ target.mean[..., None])[..., 0] + constant, source.mean)


def test_a_prior_shrinks_the_map_to_nothing():
    source, target = Moments.of(vectors()), Moments.of(vectors())
    sizes = [(transport(source, target, prior=p)[0] - torch.eye(3)).norm().item() for p in (0.0, 0.5, 1.0)]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 1e-9


def test_a_dead_layer_stays_finite():
    dead = Moments.of(torch.zeros(1, 3, 10))
    linear, constant = transport(dead, dead)
    assert torch.isfinite(linear).all() and torch.isfinite(constant).all()


@pytest.mark.parametrize(('changes', 'word'), [(dict(fit='half'), 'half'), (dict(target=Moments(1, 3)), 'differ')])
def test_maps_that_do_not_exist_are_refused(changes, word):
    arguments = dict(source=Moments.of(vectors()), target=Moments.of(vectors()), fit='full')
    with pytest.raises(ValueError, match=word):
        transport(**{**arguments, **changes})


def test_convolutions_return_the_source_moments(net, clean, noisy, monkeypatch):
    """Measured again on the noisy images, with all earlier layers corrected; two means are taken by a BatchNorm."""
    monkeypatch.setattr(import_module('mmdenoiserep.core.calibration.match'), 'RIDGE', 1e-9)
    source, before = (collect_moments(denoised(net), batches) for batches in (clean, noisy))
    model = denoised(net)
    report = calibrate(model, [torch.cat(noisy)], 'domain', source)
    assert {row.name for row in report.layers if row.note} == {'fc3'}, 'nothing takes its constant'
    after = collect_moments(model, noisy)
    for name, norm in {'conv1': 'bn1', 'conv2': None, 'conv3': 'bn3'}.items():
        mean = after[name].mean.flatten()
        if norm:
            mean = mean + net.get_submodule(norm).running_mean - model.get_submodule(norm).running_mean
        expected = source[name].mean.flatten()
        assert relative(mean, expected) < 1e-6 < relative(before[name].mean.flatten(), expected)
        assert relative(after[name].covariance, source[name].covariance) < 1e-6
        assert relative(before[name].covariance, source[name].covariance) > 1e-3


def test_linear_layers_see_the_source_moments(net, clean, noisy, monkeypatch):
    """What the old weight multiplies is ``A x + c``, here with a LayerNorm that took a part of c: ``W' = W A``."""
    monkeypatch.setattr(import_module('mmdenoiserep.core.calibration.match'), 'RIDGE', 1e-9)
    source = collect_moments(denoised(net), clean)
    model = denoised(net)
    calibrate(model, [torch.cat(noisy)], 'domain', source)
    assert not torch.equal(model.norm.bias, net.norm.bias)
    linear = torch.linalg.lstsq(net.fc1.weight, model.fc1.weight).solution
    after = collect_moments(model, noisy)['fc1']
    assert relative(after.mean @ linear.mT, source['fc1'].mean) < 1e-6
    assert relative(linear @ after.covariance[0] @ linear.mT, source['fc1'].covariance[0]) < 1e-6


def test_the_bias_of_a_linear_layer_takes_the_constant(net, clean, noisy):
    """``W' x + b' = W (A x + c) + b``: with the mean alone, the bias moves by W times the shift of the mean."""
    source, target = (collect_moments(denoised(net), batches)['fc2'] for batches in (clean, noisy))
    model = denoised(net)
    calibrate(model, [torch.cat(noisy)], 'domain', dict(fc2=source), layers=['fc2'], fit='mean')
    assert torch.equal(model.fc2.weight, net.fc2.weight)
    expected = net.fc2.bias + net.fc2.weight @ (source.mean - target.mean)[0]
    assert relative(model.fc2.bias.detach(), expected.detach()) < 1e-12


def test_one_batch_in_turn_is_one_pass_for_each_layer(net, clean, noisy):
    source = collect_moments(denoised(net), clean)
    turn, passes = denoised(net), denoised(net)
    assert calibrate(turn, [torch.cat(noisy)], 'domain', source).passes == 1
    assert calibrate(passes, iter(noisy), 'domain', source).passes == 6
    state = turn.state_dict()
    for name, value in passes.state_dict().items():
        assert (value - state[name]).abs().max() < 1e-10, name


def test_the_source_domain_needs_no_correction(net, clean):
    source = collect_moments(denoised(net), clean)
    model = denoised(net)
    calibrate(model, [torch.cat(clean)], 'domain', source)
    x = torch.cat(clean)
    assert relative(model(x).detach(), net(x).detach()) < 1e-9


@pytest.mark.parametrize(
    'options', [dict(), dict(fit='covariance'), dict(fit='diagonal'), dict(fit='mean'), dict(rank=2), dict(prior=8.0)]
)
def test_the_result_is_a_vanilla_model(net, clean, noisy, options):
    source = collect_moments(denoised(net), clean)
    model = denoised(net)
    calibrate(model, [torch.cat(noisy)], 'domain', source, **options)
    fused = fuse_model(model)
    assert {n: (p.shape, p.dtype) for n, p in fused.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in net.state_dict().items()
    }
    x = torch.cat(noisy)
    assert torch.equal(fused(x), model(x))
    assert relative(fused(x).detach(), net(x).detach()) > 1e-3


def test_only_the_named_layers_change(net, clean, noisy):
    source = collect_moments(denoised(net), clean)
    model = denoised(net)
    calibrate(model, [torch.cat(noisy)], 'domain', source, layers=['conv1', 'fc2'])
    changed = {n for n, p in fuse_model(model).state_dict().items() if not torch.equal(p, net.state_dict()[n])}
    assert changed == {'conv1.weight', 'bn1.running_mean', 'fc2.weight', 'fc2.bias'}


class Residual(nn.Module):
    """A convolution whose output two read, and a BatchNorm that two convolutions feed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.left = nn.Conv2d(3, 3, 1, bias=False)
        self.right = nn.Conv2d(3, 3, 1, bias=False)
        self.both = nn.BatchNorm2d(3)
        self.alone = nn.Conv2d(3, 3, 1, bias=False)
        self.own = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        x = x + self.norm(x)
        x = self.both(self.left(x)) + self.both(self.right(x))
        y = self.alone(x)
        return self.own(y)


def test_who_feeds_whom_is_seen_in_the_execution():
    net = Residual().eval()
    layers = {name: layer for name, layer in net.named_modules() if name}
    assert find_sole_readers(net, layers, torch.randn(1, 3, 4, 4)) == {'alone': 'own'}
    assert all('forward' not in layer.__dict__ for layer in net.modules())


def test_norms_that_can_take_no_constant_are_left_alone(clean):
    """A BatchNorm without running statistics and a LayerNorm without bias: the shift of the mean is left out."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.bn = nn.BatchNorm2d(4, track_running_stats=False)
            self.norm = nn.LayerNorm(4, elementwise_affine=False)
            self.fc = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.fc(self.norm(self.bn(self.conv(x)).flatten(2).mT))

    torch.manual_seed(0)
    source = collect_moments(denoised(Bare().double()), clean)
    report = calibrate(denoised(Bare().double()), [torch.cat(clean) + 1], 'domain', source)
    assert [row.name for row in report.layers if row.note] == ['conv', 'fc']


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
    torch.manual_seed(0)
    net, clean = Mixed().double().eval(), torch.randn(200, 6, dtype=torch.float64)
    model = copy.deepcopy(net)
    apply_denoiserep(model, 'all', example_input=clean[:1])
    report = calibrate(model, [clean * 2 + 3], 'domain', collect_moments(model, [clean]))
    assert [row.name for row in report.layers if row.note] == ['fc', 'conv']
    changed = {n for n, p in fuse_model(model).state_dict().items() if not torch.equal(p, net.state_dict()[n])}
    assert changed == {'fc.weight', 'conv.weight'}


def test_the_source_may_be_on_another_device(net, clean, noisy):
    """Moments of a file are on the CPU, those of the target where the model is."""

    class Elsewhere(Moments):
        def to(self, device):
            assert device == torch.device('cpu')
            return self.here

    source = collect_moments(denoised(net), clean)
    away = {}
    for name, seen in source.items():
        away[name] = Elsewhere(*seen.mean.shape, device='meta')
        away[name].here = seen
    here, there = denoised(net), denoised(net)
    for model, moments in ((here, source), (there, away)):
        calibrate(model, [torch.cat(noisy)], 'domain', moments)
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))
    moved = source['fc1'].to('meta')
    assert moved.mean.is_meta and moved.scatter.is_meta and moved.count == source['fc1'].count


def test_the_pass_ends_behind_the_last_layer(net, clean, noisy):
    """With one batch too: what comes after the last fitted layer is not computed."""
    source, calls = collect_moments(denoised(net), clean), []
    model = denoised(net)
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    calibrate(model, [torch.cat(noisy)], 'domain', source, layers=['conv1'])
    everything = list(calls)
    assert everything.count('fc3') == 1, 'the run that shows who feeds whom'
    assert everything[-1] == 'conv1'


@pytest.mark.parametrize('fit', ['diagonal', 'mean'])
def test_a_rank_says_nothing_of_means_and_variances(net, clean, noisy, fit):
    source = collect_moments(denoised(net), clean)
    report = calibrate(denoised(net), [torch.cat(noisy)], 'domain', source, fit=fit, rank=2)
    assert all(row.rank is None for row in report.layers)


def test_a_replaced_forward_stays(net):
    net.norm.forward = lambda x: x
    mine = net.norm.forward
    find_sole_readers(net, {'norm': net.norm, 'fc1': net.fc1}, torch.randn(1, 3, 6, 6, dtype=torch.float64))
    assert net.norm.forward is mine


def test_an_output_that_the_model_returns_is_read_by_the_user_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y), y

    net = Both().eval()
    layers = dict(conv=net.conv, norm=net.norm)
    assert find_sole_readers(net, layers, torch.randn(1, 3, 4, 4)) == {}


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(mode='noise'), ('noise', 'schedule', 'domain')),
        (dict(mode='domain'), ('source', 'collect_moments')),
        (dict(layers=['fc9']), ('fc9',)),
        (dict(prior=-1.0), ('prior', '-1')),
        (dict(batches=[]), ('no image',)),
        (dict(mode='domain', source={}), ('conv1',)),
        (dict(mode='domain', source={'conv1': Moments(1, 3)}), ('conv1', '3', '8')),
        (dict(mode='domain', fit='half', source={}), ('half', 'diagonal')),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(net, clean, options, words):
    model = denoised(net)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        calibrate(model, **{'batches': clean, **options})
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_trained_denoisers_and_missing_ones_are_refused(net, clean):
    with pytest.raises(ValueError, match='apply_denoiserep'):
        calibrate(net, clean)
    model = denoised(net)
    source = collect_moments(model, clean)
    calibrate(model, clean)
    with pytest.raises(ValueError, match='fuse the model'):
        calibrate(model, clean, 'domain', source)


def test_the_schedule_of_the_conversion_is_the_one_that_is_solved(net, clean):
    strong = denoised(net, schedule=NoiseSchedule(0.01, 0.2, 100))
    report, weak = calibrate(strong, clean), calibrate(denoised(net), clean)
    assert all(a.moved > 10 * b.moved for a, b in zip(report.layers, weak.layers, strict=True))


# Several processes


def calibrate_in_process(rank, folder):
    """Calibrates with a half of the images in one of two processes, and keeps the result."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    case = torch.load(folder / 'case.pth', weights_only=True)
    states = {}
    for name, options in case['runs'].items():
        model = denoised(Net().double().eval())
        model.load_state_dict(case['state'])
        source = {key: Moments.from_state_dict(value) for key, value in case['source'].items()}
        report = calibrate(model, list(case['images'].chunk(2)[rank].split(options['split'])), options['mode'], source)
        assert report.images == len(case['images'])
        states[name] = model.state_dict()
    torch.save(states, folder / f'rank{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_processes_calibrate_as_one(net, clean, noisy, tmp_path):
    """Each with its own images: the same layers as one process with all of them, and the same bits in both."""
    start, images = denoised(net).state_dict(), torch.cat(noisy)
    source = collect_moments(denoised(net), clean)
    runs = {
        'schedule': dict(mode='schedule', split=4),
        'in turn': dict(mode='domain', split=12),
        'layer by layer': dict(mode='domain', split=5),
    }
    moments = {name: value.state_dict() for name, value in source.items()}
    torch.save(dict(state=start, images=images, source=moments, runs=runs), tmp_path / 'case.pth')
    torch.multiprocessing.spawn(calibrate_in_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in range(2))
    for name, options in runs.items():
        model = denoised(net)
        calibrate(model, [images], options['mode'], source)
        for key, value in model.state_dict().items():
            assert torch.equal(first[name][key], second[name][key]), key
            assert (first[name][key] - value).abs().max() < 1e-9 * max(1, value.abs().max()), key

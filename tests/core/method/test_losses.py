"""The loss of all denoisers of a model in training: stable under any optimizer, and taken of what ran."""

import contextlib
import copy
import io
import math
from pathlib import Path

import mmdet
import mmpretrain.engine  # noqa: F401  registers Lamb and LARS
import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, DefaultScope
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import denoised, randomise
from mmdenoiserep import apply_denoiserep, denoise_losses, fuse_model
from mmdenoiserep.core.method.sample import Sample

SCALES = (1e-2, 1.0, 255.0)


def library_optimizers():
    """The settings of every kind of optimizer in the libraries' base schedules, with the largest learning rate."""
    found = {}
    for library in (mmdet, mmseg, mmpretrain):
        for path in sorted(Path(library.__file__).parent.glob('.mim/configs/_base_/schedules/*.py')):
            optimizer = Config.fromfile(path).optim_wrapper.get('optimizer') or Config.fromfile(path).optimizer
            kind = optimizer.type + (' with nesterov' if optimizer.get('nesterov') else '')
            if kind not in found or optimizer.lr > found[kind]['lr']:
                found[kind] = optimizer.to_dict()
    return found


OPTIMIZERS_IN_USE = library_optimizers() | dict(
    RMSprop=dict(type='RMSprop', lr=0.064, alpha=0.9, momentum=0.9, eps=0.0316),  # of mmpretrain's MobileNetV3
    Adam=dict(type='Adam', lr=5e-4),
)


def test_the_optimizers_are_found():
    assert {'SGD', 'SGD with nesterov', 'AdamW', 'Lamb', 'LARS'} <= OPTIMIZERS_IN_USE.keys()


def features(scale, seed):
    """Correlated features with a mean, (64, 24) x scale, whose strongest direction has 100 times the weakest's size."""
    generator = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(64, 24, generator=generator) * torch.logspace(-1, 1, 24).sqrt() + 0.5)


def train(optimizer, scale, rank, weight, limited=True, steps=100):
    """Trains one layer while the learning rate decays.

    Returns:
        The loss on all features at the end, divided by that at the start; the largest ``|x' - x| / |x|`` of any step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 8))
    apply_denoiserep(model, 'all', rank=rank, example_input=features(scale, 0))
    layer, x = model[0], features(scale, 0)
    before, changes = layer.denoise_loss(x).item(), []
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        optimizer = OPTIMIZERS.build(optimizer | dict(params=model.parameters()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with denoise_losses(model, tokens=32) as losses:
        for step in range(steps):
            optimizer.zero_grad()
            batch = features(scale, step % 4)
            model(batch)
            loss = losses.mean(weight) if limited else weight * layer.denoise_loss(batch, math.inf)
            loss.backward()
            optimizer.step()
            schedule.step()
            changes.append(((layer.correct(x) - x).norm() / x.norm()).item())
    return layer.denoise_loss(x).item() / before, max(changes)


@pytest.mark.parametrize('weight', [0.01 / 35, 1.0])
@pytest.mark.parametrize('rank', [None, 4])
@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', OPTIMIZERS_IN_USE)
def test_training_is_stable(name, scale, rank, weight):
    """Under no optimizer of the libraries does the training diverge, on features from 1e-2 to 255.

    Steps of one size for every entry (Adam, AdamW, Lamb) take B past its minimum first, by the learning rate and not
    more: the features never change by a tenth, and the loss comes down with the learning rate.
    """
    ratio, change = train(OPTIMIZERS_IN_USE[name], scale, rank, weight)
    assert ratio < (math.inf if name in ('Adam', 'AdamW', 'Lamb') and scale > 1 else 6 if name == 'Lamb' else 1.5)
    assert change < (0.1 if scale >= 1 else 0.5)  # of weak features, most is taken for noise at the minimum too
    assert change > 0


@pytest.mark.parametrize('name', ['SGD', 'SGD with nesterov', 'LARS', 'RMSprop'])
def test_without_the_limit_training_diverges(name):
    """The counter-proof: with the derivative itself, the same runs end in features that are something else."""
    ratio, change = train(OPTIMIZERS_IN_USE[name], 255.0, None, 1.0, limited=False)
    assert not ratio < 1e3
    assert not change < 0.1


@pytest.mark.parametrize('rank', [None, 4])
@pytest.mark.parametrize('kind', [nn.Linear, nn.Conv2d])
def test_the_limit_keeps_value_and_direction(kind, rank):
    """The loss stays bitwise, its gradient is divided by a power of two: just enough for a curvature of at most 1."""
    layer = denoised(kind(12, 6, *([1] if kind is nn.Conv2d else [])).double(), rank)
    x = 30 * torch.randn(5, 12, *([4, 4] if kind is nn.Conv2d else []), dtype=torch.float64)
    parameters = list(layer.denoiser.parameters())
    bound = layer.denoiser.correction().curvatures(Sample()(layer, x), layer.reverse_step).item()
    assert bound > 1e3
    plain, limited = layer.denoise_loss(x, math.inf), layer.denoise_loss(x, 1.0)
    assert torch.equal(plain, limited)
    exact = torch.autograd.grad(plain, parameters)
    for factor, loss in ((2.0 ** -math.ceil(math.log2(bound)), limited), (1.0, layer.denoise_loss(x, 2 * bound))):
        for actual, expected in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
            assert expected.abs().max() > 0
            assert torch.equal(actual, factor * expected)


class Net(nn.Module):
    """Three layers: one is called twice, the last one only in every second forward; checkpointed or not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.count = 0
        self.checkpointed = False

    def forward(self, x):
        def body(x):
            x = self.conv(x).tanh().movedim(1, -1)
            return self.shared(self.shared(x).tanh())

        x = checkpoint(body, x, use_reentrant=False) if self.checkpointed else body(x)
        self.count += 1
        return self.sometimes(x) if self.count % 2 else x


def net():
    torch.manual_seed(0)
    model = Net().double()
    apply_denoiserep(model, 'all', rank=2, example_input=torch.randn(1, 3, 5, 5).double())
    randomise(model, 1e-3)
    model.count = 0
    return model, torch.randn(2, 3, 5, 5, dtype=torch.float64)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_mean_is_that_of_the_layers_that_ran():
    """All tokens: the mean of the layers' own losses over all their calls, of those that the last forward called."""
    model, x = net()
    seen = {model.get_submodule(name): [] for name in ('conv', 'shared', 'sometimes')}
    for layer, calls in seen.items():
        layer.register_forward_pre_hook(lambda layer, args, calls=calls: calls.append(args[0].detach()))
    with denoise_losses(model, tokens=None) as losses:
        for ran in (3, 2):
            for calls in seen.values():
                calls.clear()
            model(x)
            expected = [layer.denoise_loss(torch.cat(calls)).item() for layer, calls in seen.items() if calls]
            assert len(expected) == ran
            assert losses.mean(0.5).item() == pytest.approx(0.5 * sum(expected) / ran, rel=1e-9)
        assert losses.ran == {'conv', 'shared', 'sometimes'}


def test_two_forwards_and_none():
    """Only the last forward counts; without one, or without a trainable denoiser in it, the loss is zero."""
    model, x = net()
    with denoise_losses(model, tokens=None) as losses:
        empty = losses.mean()
        empty.backward()
        assert empty.item() == 0
        assert all(not g.any() for g in gradients(model).values()) and len(gradients(model)) == 4 + 2 * 4 - 1
        model(x)
        model(10 * x)
        twice = losses.mean().item()
        model.count = 1
        model(10 * x)
        assert losses.mean().item() == twice
        for layer in (model.conv, model.shared, model.sometimes):
            layer.denoiser.requires_grad_(False)
        model(x)
        assert losses.mean().item() == 0


def test_a_model_that_calls_itself():
    """A forward inside of a forward is a part of it, also after one that was interrupted."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            if not len(x):
                raise KeyboardInterrupt
            if x.dim() == 3:
                x = torch.stack([self(view) for view in x])
            return self.last(self.first(x).tanh())

    torch.manual_seed(0)
    model, views = Model(), torch.randn(2, 5, 6)
    apply_denoiserep(model, 'all', example_input=views[0])
    with torch.no_grad():
        flat = model(views[0]), model(views[1])
    with denoise_losses(model, tokens=None) as losses:
        with pytest.raises(KeyboardInterrupt):
            model(views[:0])
        losses.mean()
        model(views)
        inputs = torch.cat([*views, *flat])
        expected = [model.first.denoise_loss(inputs), model.last.denoise_loss(model.first(inputs).tanh())]
        assert losses.mean().item() == pytest.approx(sum(loss.item() for loss in expected) / 2)


def test_a_draw_of_tokens():
    """Every forward draws other tokens, the same ones with the same number, and touches no random number."""
    model, x = net()
    values = []
    with denoise_losses(model, tokens=6) as losses:
        for draw in (0, 1, 0):
            losses.draw, model.count = draw, 0
            state = torch.get_rng_state()
            model(x)
            assert torch.equal(torch.get_rng_state(), state)
            values.append(losses.mean().item())
    assert values[0] == values[2] != values[1]


def test_checkpointing_and_label_losses_do_not_interfere():
    """Layers that run again in the backward pass are not heard; the label loss and its gradients stay bitwise."""
    runs = []
    for checkpointed, listening in ((False, False), (False, True), (True, True)):
        model, x = net()
        model.checkpointed = checkpointed
        with denoise_losses(model) if listening else contextlib.nullcontext() as losses:
            loss = model(x).square().mean()
            value = losses.mean(0.01) if listening else torch.zeros(())
            (loss + value).backward()
            assert not losses or not losses._inputs
        runs.append((value.item(), gradients(model)))
    base = {name: g for name, g in runs[0][1].items() if 'denoiser' not in name}
    assert base and all(torch.equal(run[1][name], g) for run in runs for name, g in base.items())
    assert runs[1][0] == runs[2][0] > 0
    assert runs[1][1].keys() == runs[2][1].keys() > base.keys()
    for name, gradient in runs[1][1].items():
        assert torch.equal(runs[2][1][name], gradient)


@pytest.mark.parametrize('error', [KeyboardInterrupt, ArithmeticError])
def test_nothing_is_left_after_an_interrupt(error):
    model, x = net()
    with pytest.raises(error), denoise_losses(model):
        model(x)
        raise error
    model.shared.register_forward_hook(lambda *_: exec('raise error', dict(error=error)))
    with pytest.raises(error), denoise_losses(model):
        model(x)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules() if m is not model.shared)


def test_copies_and_files_of_a_model_in_training_record_nothing():
    """Weights are averaged, and models saved, while they train."""
    model, x = net()
    with denoise_losses(model) as losses:
        model(x)
        average, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        before = losses.draw
        for other in (average, torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
            other(x)
            hooks = [
                getattr(hook, 'func', hook).__self__ for m in other.modules() for hook in m._forward_pre_hooks.values()
            ]
            assert hooks and not any(hook._inputs for hook in hooks)
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in fuse_model(other).modules())
        assert losses.draw == before and losses.mean() > 0


def test_model_without_denoisers():
    with pytest.raises(ValueError, match='apply_denoiserep'), denoise_losses(nn.Linear(3, 3)):
        pass


@pytest.mark.parametrize('elements', [1, 900, 2**18])
@pytest.mark.parametrize('rank', [None, 1])
def test_layers_of_one_shape_keep_their_timesteps(rank, elements, monkeypatch):
    """Grouped convolutions, one, two or three at once, against the expectation over the noise, written out."""
    monkeypatch.setattr('mmdenoiserep.core.method.loss.BATCH_ELEMENTS', elements)
    torch.manual_seed(0)
    layers = [denoised(nn.Conv2d(8, 8, 1, groups=4), rank, timestep=timestep) for timestep in (2, 300, 900)]
    model = nn.Sequential(*layers).double()
    features = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    with denoise_losses(model, tokens=None) as losses:
        model(features)
        loss = losses.mean(1e-9) * 1e9  # far below the limit of the curvature

    expected = []
    for layer in layers:
        signal, noise, c1, c3_minus_1 = layer.reverse_step
        eye = torch.eye(2, dtype=torch.float64)
        noise_of = (layer.denoiser.matrix() + c3_minus_1 * eye) / c1  # D, (4, 2, 2)
        vectors = features.unflatten(1, (4, 2)).permute(1, 2, 0, 3, 4).flatten(2)  # (4, 2, n)
        predicted = signal * noise_of @ vectors + layer.denoiser.bias.reshape(4, 2, 1) / c1
        expected.append(predicted.square().mean() + (eye - noise * noise_of).square().sum((1, 2)).mean() / 2)
        features = layer(features).detach()
    parameters = [parameter for layer in layers for parameter in layer.denoiser.parameters()]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-9, atol=0)
    pairs = (torch.autograd.grad(value, parameters) for value in (loss, torch.stack(expected).mean()))
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-12)

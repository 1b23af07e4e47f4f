"""A domain fit in one pass: the weights of a pass a layer, whatever the batches are, and all or nothing."""

from contextlib import nullcontext

import pytest
import torch
from mmdet.models import FPN
from mmpretrain.models import MobileNetV2, ResNet, SwinTransformer, VisionTransformer
from mmseg.models import MixVisionTransformer
from torch import nn

from calibration_helpers import CLEAN, NOISY, Branch, Net, Second, built, changed, data, fit, gather, notes, supporting
from helpers import copied, equal, relative
from mmdenoiserep.apis.calibration import Extractor
from mmdenoiserep.core import Support, collect_moments, evaluating, fit_domain, select_layers, transport
from mmdenoiserep.core.calibration import domain as domain_module
from mmdenoiserep.core.calibration.domain import STRENGTH, solving_dtype
from mmdenoiserep.core.calibration.features import Features
from mmdenoiserep.core.calibration.halves import ImageVectors
from mmdenoiserep.core.calibration.maps import fold_map
from mmdenoiserep.core.calibration.match import find_support
from mmdenoiserep.core.calibration.norms import find_norms
from mmdenoiserep.core.calibration.readers import Readers
from mmdenoiserep.core.calibration.takers import Takers, find_obstacles, owned_tensors
from mmdenoiserep.core.method.sample import Sample
from mmdenoiserep.core.utils.intercept import intercepting
from mmdenoiserep.core.utils.lockstep import Lockstep
from mmdenoiserep.models.vmamba import VMamba


def fit_by_passes(model, layers, batches, source, support=None):
    """Fits layer after layer, each with a pass of its own over the model as it is by then."""
    readers = Readers({**layers, **find_norms(model)}, owned_tensors(model, layers))
    with evaluating(model), readers.watching():
        for batch in batches:
            readers.run(model, batch)
    takers = Takers.seen_by(readers, model, layers, find_obstacles(model))
    for name, layer in layers.items():
        inputs = recorded(model, name, layer, batches)
        if name in takers.unfit or not inputs:
            continue
        norm = takers.norms.get(name)
        kept = layer.bias is not None or norm is not None
        moments = source[name] if kept else source[name].about_zero()
        seen, dtype = ImageVectors(Features(layer)), solving_dtype(layer)
        for images, x in inputs:
            sample = Sample(images=images)
            vectors = seen.features.vectors(sample, x, 1)
            seen.add(vectors, sample.parts(vectors.shape[2]))
        halves = seen.halves(moments.factor(dtype))
        first, second = halves if kept else (half.about_zero() for half in halves)
        share = support or find_support(moments, (first, second), moments.factor(dtype))
        strength = 1.0 if support or layer is next(iter(layers.values())) else STRENGTH
        fold_map(layer, norm, *transport(moments, first.merged(second), share, dtype, strength))


@torch.no_grad()
def recorded(model, name, layer, batches):
    """Returns the first input of a layer in each batch, with the number of images."""
    inputs = []

    def record(_, forward, x):
        seen.append(x)
        return forward(x)

    with evaluating(model), intercepting({name: layer}, record):
        for batch in batches:
            seen = []
            model(batch)
            inputs += [(len(batch), x) for x in seen[:1]]
    return inputs


class Detector(nn.Module):
    """A backbone with a neck and a head, which stays as it is."""

    def __init__(self):
        super().__init__()
        self.backbone = ResNet(18, stem_channels=8, base_channels=8, out_indices=(1, 2, 3))
        self.neck = FPN([16, 32, 64], 8, num_outs=4, norm_cfg=dict(type='BN'), add_extra_convs='on_output')
        self.head = nn.Conv2d(8, 2, 3)

    def extract_feat(self, images):
        return self.neck(self.backbone(images))


VIT = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
MIT = dict(embed_dims=8, num_stages=2, num_layers=[1, 2], num_heads=[1, 2], sr_ratios=[2, 1], out_indices=(0, 1))
SHAPES = {
    'resnet': (lambda: ResNet(18, stem_channels=8, base_channels=8), (32, 32), (32, 48), (40, 36)),
    'vit': (lambda: VisionTransformer(VIT, img_size=32, patch_size=8), (32, 32), (32, 48), (48, 40)),
    'mit': (lambda: MixVisionTransformer(**MIT, patch_sizes=[7, 3], strides=[4, 2]), (32, 32), (32, 48), (40, 36)),
    'swin': (
        lambda: SwinTransformer(dict(embed_dims=16, depths=[2, 1], num_heads=[2, 4]), out_indices=(0, 1)),
        (56, 56),
        (56, 84),
        (84, 72),
    ),
    'vmamba': (
        lambda: VMamba(dict(dims=(16, 32), depths=(1, 1), ssm_ratio=1.0), out_indices=(1,)),
        (32, 32),
        (32, 48),
        (40, 36),
    ),
    'mobilenet': (lambda: MobileNetV2(0.25), (32, 32), (32, 48), (40, 36)),
    'detector': (lambda: Extractor.of(Detector(), 'backbone'), (64, 64), (64, 96), (72, 80)),
}


@pytest.mark.parametrize(
    ('dtype', 'support', 'tolerance'),
    [(torch.float64, None, 1e-9), (torch.float64, Support(), 1e-9), (torch.float32, Support(), 1e-5)],
)
@pytest.mark.parametrize('kind', SHAPES)
def test_weights_are_those_of_a_pass_a_layer(kind, dtype, support, tolerance):
    """Five batches of three shapes, in an order of their own."""
    make, *shapes = SHAPES[kind]
    model, expected, plain = (built(make, dtype) for _ in range(3))
    sizes = [shapes[i] for i in (0, 1, 0, 2, 1)]
    clean = [data(3, 3, *size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]
    noisy = [data(3, 3, *size, seed=9 + i, noisy=True, dtype=dtype) for i, size in enumerate(sizes)]
    layers = select_layers(model, example_input=clean[0])
    source = collect_moments(plain, {name: plain.get_submodule(name) for name in layers}, clean)
    with supporting() if support else nullcontext():
        report = fit(model, noisy, source)
    fit_by_passes(expected, {name: expected.get_submodule(name) for name in layers}, noisy, source, support)
    assert [row.name for row in report.layers] == list(layers) and report.images == 15
    moved = changed(model, plain)
    assert moved == changed(expected, plain) and len(moved) >= (len(layers) if support else 4) and len(layers) > 6
    for name in moved:
        assert relative(model.state_dict()[name], expected.state_dict()[name]) < tolerance, name
    first = f'{next(iter(layers))}.weight'
    assert relative(plain.state_dict()[first], expected.state_dict()[first]) > 1e-2, 'a fit that does nothing'
    if kind == 'detector':
        assert sum(name.startswith('neck.') for name in layers) == 7 and not any('head' in name for name in layers)


def test_layers_fitted_at_once_would_be_others():
    """What a pass a layer is for: each layer is fitted on the stream that the earlier ones correct."""
    model, plain, source = built(), built(), gather(built(), CLEAN)
    with supporting():
        fit(model, NOISY, source)
    target = gather(plain, NOISY)
    fold_map(plain.fc3, None, *transport(source['fc3'], target['fc3']))
    assert relative(plain.fc3.weight.detach(), model.fc3.weight.detach()) > 1e-2


class Modes(nn.Module):
    """Switches what torch keeps for a thread, inside of its forward, by the brightness of its images."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.seen = []

    def forward(self, x):
        kind = int(x[0, 0, 0, 0])
        with [torch.enable_grad(), torch.inference_mode(), torch.autocast('cpu', torch.bfloat16), torch.no_grad()][
            kind
        ]:
            x = torch.tanh(self.a(x))
            self.note(kind, x)
            with torch.autocast('cpu', torch.bfloat16, enabled=kind == 1), torch.set_grad_enabled(kind == 3):
                x = torch.relu(self.b(x.float().movedim(-1, 1)).movedim(1, -1))
                self.note(kind, x)
            x = self.c(x.float())
            self.note(kind, x)
        return x.double()

    def note(self, kind, x):
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')
        self.seen.append((kind, *modes, x.dtype))


@pytest.mark.parametrize('outside', [torch.enable_grad, torch.inference_mode])
def test_each_run_has_its_own_modes(outside):
    """Grad mode, inference mode and autocast; as in runs one after the other, and as they were afterwards."""
    model = built(Modes, torch.float32)
    batches = [data(4, 3, 3, 8, seed=kind, dtype=torch.float32) for kind in range(4)] * 2
    for number, batch in enumerate(batches):
        batch[0, 0, 0, 0] = (number + 1) % 4 + 0.5  # inference mode first
    source = gather(model, batches)
    with outside():
        model.seen.clear()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        expected = sorted(model.seen, key=str)
        assert len(set(expected)) == 8
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')
        plain = copied(model.state_dict())
        model.seen.clear()
        fit(model, [torch.cat([batch[:1], 3 * batch[1:] + 1]) for batch in batches], source)
        assert sorted(model.seen[3:], key=str) == expected, 'besides the run that shows who reads what'
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'))
        assert not equal(model.state_dict(), plain)


@pytest.mark.parametrize('batches', [[(9, 6), (9, 5), (9, 7)], [(9, 5), (9, 6), (9, 5)]])
def test_a_layer_that_some_batches_do_not_reach(batches):
    """They wait at the next one, and the layer is fitted to those that reach it."""
    model, expected = built(Branch), built(Branch)
    batches = [data(*shape, 8, seed=i, noisy=True) for i, shape in enumerate(batches)]
    source = gather(model, [data(30, 6, 8)])
    report = fit(model, batches, source)
    assert [row.name for row in report.layers] == ['a', 'b', 'o'] and not report.skipped
    fit_by_passes(expected, {name: expected.get_submodule(name) for name in 'abo'}, batches, source)
    for name, value in model.state_dict().items():
        assert relative(value, expected.state_dict()[name]) < 1e-9


def test_the_images_of_the_source_need_no_map_where_vectors_are_sampled():
    """The same vectors are sampled in both passes, so that the moments are equal."""
    model, plain, other = built(), built(), built()
    with supporting():
        fit(model, CLEAN, gather(plain, CLEAN, stride=3), stride=3)
        fit(other, CLEAN, gather(plain, CLEAN, stride=3), stride=2)
    for name, value in plain.named_parameters():
        assert (model.state_dict()[name] - value).abs().max() < 1e-9, name
    assert relative(other.conv1.weight.detach(), plain.conv1.weight.detach()) > 1e-3


class Stop(BaseException):
    """What ends a program, as an interrupt does."""


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize('where', ['forward', 'solver', 'pause', 'progress', 'batches'])
def test_an_error_in_the_middle_changes_nothing(where, error, monkeypatch):
    """All tensors keep their bits; no forward stays replaced, no hook is left, and all runs have ended."""
    model, source, ended, calls = built().train(), gather(built(), CLEAN), [], 0

    def fail_late(*_, **__):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error('in the middle')

    class Watching(Net):
        def forward(self, x):
            try:
                return super().forward(x)
            finally:
                ended.append(len(x))

    model.__class__ = Watching
    batches, options = NOISY, {}
    if where == 'forward':
        model.conv2.register_forward_pre_hook(fail_late)
        model.fc1.register_forward_pre_hook(fail_late)
    elif where == 'solver':
        solve = domain_module.transport
        monkeypatch.setattr(domain_module, 'transport', lambda *args: (fail_late(), solve(*args))[1])
    elif where == 'pause':
        pause = Lockstep.pause
        monkeypatch.setattr(Lockstep, 'pause', lambda self, place: (pause(self, place), fail_late())[0])
    elif where == 'progress':
        options = dict(progress=fail_late)
    else:
        batches = Failing(fail_late)
    before, hooks = copied(model.state_dict()), {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    with pytest.raises(error):
        fit(model, batches, source, **options)
    assert calls == 5 and equal(model.state_dict(), before)
    assert model.training and all(module.training for module in model.modules())
    assert all('forward' not in module.__dict__ for module in model.modules())
    assert {name: len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert len(ended) == 1 + (5 - 1 if where == 'batches' else 3), 'the run of one image, and all others'
    monkeypatch.undo()
    model.conv2._forward_pre_hooks.clear()
    model.fc1._forward_pre_hooks.clear()
    fit(model, NOISY, source)
    assert not equal(model.state_dict(), before), 'the next fit works'


class Failing:
    """Batches that fail where they are read."""

    def __init__(self, fail):
        self.fail = fail

    def __iter__(self):
        for i in range(9):
            self.fail()
            yield NOISY[i % 3]


class Restless(nn.Module):
    """Reads the output of another norm once more in the second run of each pass."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(9))
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(9))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        for number, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            y = norm(x)
            x = x + layer(y) + (y if self.runs == 2 * number + 2 else 0)
        return x


def test_a_model_that_is_never_read_twice_in_the_same_way_is_refused():
    """A pass is repeated if it shows other readers than the one before, but not for ever."""
    model, images = built(Restless), data(16, 8)
    source, before = gather(model, [images]), copied(model.state_dict())
    model.runs = 0
    with pytest.raises(ValueError, match='5 passes'):
        fit(model, [images * 2], source)
    assert equal(model.state_dict(), before)


def test_a_layer_that_no_image_reaches_and_one_that_runs_twice():
    model, source = built(Second), gather(built(Second), [data(40, 8)])
    assert notes(fit(model, [data(40, 8, noisy=True)], source)) == {
        'a': '1 later calls in these batches were not looked at'
    }
    alone = nn.ModuleDict(dict(net=built(Branch), unused=built(lambda: nn.Linear(8, 8))))
    alone.forward = alone['net'].forward
    layers = {'net.a': alone['net'].a, 'unused': alone['unused'], 'net.o': alone['net'].o}
    done = []
    source = collect_moments(alone, layers, [data(9, 5, 8)])
    report = fit_domain(alone, layers, [data(9, 5, 8, noisy=True)], source, progress=done.append)
    assert report.skipped == {'unused': 'none of the training images reaches it'}
    assert [row.name for row in report.layers] == ['net.a', 'net.o'] and sorted(done) == sorted(layers)

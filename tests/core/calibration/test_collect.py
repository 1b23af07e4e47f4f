"""What a model calls varies: branches, experts, loops, layers that run twice; and what a batch is, too."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from helpers import relative
from mmdenoiserep.core import (
    DenoiseLayer,
    Moments,
    apply_denoiserep,
    calibrate,
    collect_moments,
    denoise_losses,
    explicit_maps,
    fuse_checkpoint,
    fuse_model,
    load_moments,
    save_moments,
    verify_fusion,
)
from mmdenoiserep.core.calibration.batches import count_images


def data(*shape, seed=0, noisy=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * 1.5 + 0.5 if noisy else x


def converted(model, example):
    model = copy.deepcopy(model)
    apply_denoiserep(model, 'all', example_input=example)
    return model


class Branch(nn.Module):
    """A layer for large images only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.o(self.a(x) + (self.b(x) if x.shape[1] > 5 else 0))


class Masked(nn.Module):
    """Requires a mask besides the images, as the backbones of masked image modelling do; None means none."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mask):
        return self.o(torch.tanh(self.a(x if mask is None else x * mask)))


@pytest.mark.parametrize('batches', [1, 2])
def test_a_backbone_that_requires_a_mask_is_fitted(batches):
    torch.manual_seed(0)
    model, clean, noisy = Masked().double(), data(6, 9, 8), data(6, 9, 8, seed=1, noisy=True)
    source = collect_moments(converted(model, clean), [clean])
    target = converted(model, clean)
    report = calibrate(target, noisy.split(6 // batches), 'domain', source)
    assert [row.name for row in report.layers] == ['a', 'o']
    with torch.no_grad(), explicit_maps(model, {row.name: (row.linear, row.constant) for row in report.layers}):
        assert relative(fuse_model(target)(noisy, None), model(noisy, None)) < 1e-9
        assert relative(model(noisy, None), copy.deepcopy(model)(clean, None)) > 1e-3


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
    """Each image goes to the expert that its content names."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.o = nn.Linear(8, 8)

    def forward(self, x):
        return self.o(torch.stack([self.experts[self.choose(image)](image) for image in x]))

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


class Pyramid(nn.Module):
    """A convolution that all levels share, as heads of detectors do; a last one that runs once."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        levels = [self.stem(x)]
        levels += [levels[0][..., ::2, ::2], levels[0][..., ::4, ::4]]
        return sum(self.last(torch.relu(self.shared(level))).mean() for level in levels)


def inputs_of(model, batches):
    """Returns all inputs of every denoised Linear layer, (vectors, C), as a plain loop with hooks gathers them."""
    seen, model = {}, copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, DenoiseLayer):
            layer.register_forward_pre_hook(
                lambda layer, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(x) for name, x in seen.items()}


@pytest.mark.parametrize(
    ('make', 'batches'),
    [
        (Branch, [data(2, 5, 8), *(data(2, 6, 8, seed=i) for i in range(4))]),
        (Branch, [data(2, 6, 8), data(2, 5, 8), data(2, 9, 8)]),
        (Loop, [-data(2, 4, 8).abs(), data(3, 4, 8).abs(), -data(2, 4, 8).abs()]),
        (Experts, [data(5, 2, 8, seed=i) * 2 for i in range(4)]),
        (lambda: Recurrent(True), [data(4, 8), data(3, 8, seed=1)]),
    ],
)
def test_moments_are_of_all_calls_in_all_batches(make, batches):
    torch.manual_seed(0)
    model = make().double().eval()
    example = torch.cat([data(1, 6, 8, seed=i) * 2 for i in range(9)]) if make is Experts else batches[-1]
    model = converted(model, example)
    expected, moments = inputs_of(model, batches), collect_moments(model, iter(batches))
    assert len({len(x) for x in expected.values()}) > 1, 'the layers see different numbers of vectors'
    for name, x in expected.items():
        assert moments[name].count == len(x), name
        assert relative(moments[name].mean[0], x.mean(0)) < 1e-9
        assert relative(moments[name].covariance[0], torch.cov(x.mT, correction=0)) < 1e-9


@pytest.mark.parametrize(
    ('make', 'shape'), [(Recurrent, (8,)), (lambda: Recurrent(True), (8,)), (Pyramid, (3, 11, 11)), (Loop, (4, 8))]
)
def test_fitted_to_the_images_of_the_source_a_model_stays(make, shape):
    """Also where a layer runs several times; in one batch and in several, which do the same."""
    torch.manual_seed(0)
    plain = make().double().eval()
    images = data(60, *shape).abs()
    model = converted(plain, images)
    source = collect_moments(model, list(images.chunk(3)))
    fitted = {}
    for batches in ([images], list(images.chunk(3))):
        clean, noisy = copy.deepcopy(model), copy.deepcopy(model)
        calibrate(clean, batches, 'domain', source)
        assert relative(fuse_model(clean)(images).detach(), plain(images).detach()) < 1e-9
        calibrate(noisy, [batch * 2 + 1 for batch in batches], 'domain', source)
        fitted[len(batches)] = fuse_model(noisy)(images).detach()
    assert relative(fitted[1], fitted[3]) < 1e-9
    assert relative(fitted[1], plain(images).detach()) > 1e-2


class Second(nn.Module):
    """The first layer runs again if there are several images, which one image does not show."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(self.b(self.a(x)))
        return self.c(self.a(x) if len(x) > 1 else x)


def test_a_layer_that_runs_again_unexpectedly_is_fitted_to_both_calls():
    torch.manual_seed(0)
    images = data(40, 8)
    model = converted(Second().double().eval(), images)
    source = collect_moments(model, [images])
    results = []
    for batches in ([images * 2 + 1], [images[:20] * 2 + 1, images[20:] * 2 + 1]):
        fitted = copy.deepcopy(model)
        report = calibrate(fitted, batches, 'domain', source)
        assert report.passes == 3
        results.append(fuse_model(fitted)(images).detach())
    assert relative(*results) < 1e-9
    assert relative(results[0], model(images).detach()) > 1e-2


def test_a_layer_that_no_image_reaches_is_skipped():
    torch.manual_seed(0)
    plain = Branch().double().eval()
    model = converted(plain, data(1, 6, 8))
    source = collect_moments(model, [data(9, 6, 8)])
    for batches in ([data(9, 5, 8, noisy=True)], [data(9, 5, 8, noisy=True), data(9, 4, 8, noisy=True)]):
        fitted = copy.deepcopy(model)
        report = calibrate(fitted, batches, 'domain', source)
        assert [row.name for row in report.layers] == ['a', 'o'] and 'reaches' in report.skipped['b']
        assert '2 layers calibrated' in str(report)
        assert any(line.startswith('b ') and 'reaches' in line for line in str(report).splitlines())
        fused = fuse_model(fitted)
        assert torch.equal(fused.b.weight, plain.b.weight) and not torch.equal(fused.a.weight, plain.a.weight)
        x = data(3, 6, 8, seed=7)
        with explicit_maps(plain, {row.name: (row.linear, row.constant) for row in report.layers}):
            assert relative(fused(x).detach(), plain(x).detach()) < 1e-9


def test_a_layer_that_no_training_image_reached_is_skipped():
    torch.manual_seed(0)
    model = converted(Branch().double().eval(), data(1, 6, 8))
    source = collect_moments(model, [data(9, 5, 8)])
    assert source['b'].count == 0
    report = calibrate(model, [data(9, 6, 8, noisy=True)], 'domain', source)
    assert [row.name for row in report.layers] == ['a', 'o'] and 'training' in report.skipped['b']
    model = converted(Branch().double().eval(), data(1, 6, 8))
    report = calibrate(model, [data(9, 5, 8)])
    assert [row.name for row in report.layers] == ['a', 'o'] and 'reaches' in report.skipped['b']


@pytest.mark.parametrize('chunks', [1, 2])
def test_an_expert_that_few_vectors_reach_is_skipped(chunks):
    """Three vectors span no covariance of eight channels; a fit would amplify what they do not show."""
    torch.manual_seed(0)
    plain = Experts().double().eval()
    images = data(80, 1, 8) * 2
    images[:, 0, 0] = -images[:, 0, 0].abs()
    model = converted(plain, torch.cat([images[:2] - 9, images[:2] + 9, images[:2] * 0 + 1]))
    everywhere = torch.cat([images, images + 4, images * 0.1 + 1])
    source = collect_moments(model, [everywhere])
    few = images.clone()
    few[:3, 0, 0] = 1.0
    fitted = copy.deepcopy(model)
    report = calibrate(fitted, list(few.chunk(chunks)), 'domain', source)
    assert [row.name for row in report.layers] == ['experts.0', 'o']
    assert report.skipped.keys() == {'experts.1', 'experts.2'} and '3 vectors' in report.skipped['experts.1']
    assert torch.equal(fitted.experts[1].weight, plain.experts[1].weight)
    report = calibrate(fitted, list(few.chunk(chunks)))
    assert [row.name for row in report.layers] == ['experts.0', 'o']
    assert '3 vectors' in report.skipped['experts.1'] and not fitted.experts[1].denoiser.weight.any()


def test_a_single_vector_is_no_covariance():
    model = converted(nn.Sequential(nn.Linear(8, 4)).double(), data(1, 8))
    source = collect_moments(model, [data(50, 8)])
    for fit in ('full', 'covariance', 'diagonal'):
        with pytest.raises(ValueError, match='0'):
            calibrate(model, [data(1, 8, seed=1)], 'domain', source, fit=fit)
        with pytest.raises(ValueError, match='0'):
            calibrate(model, [data(50, 8)], 'domain', collect_moments(model, [data(1, 8)]), fit=fit)
    report = calibrate(model, [data(1, 8, seed=1)], 'domain', source, fit='mean')
    assert [row.name for row in report.layers] == ['0']


# What a batch is


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    name: str


IMAGES = torch.zeros(6, 3, 8, 8)


@pytest.mark.parametrize(
    'batch',
    [
        IMAGES,
        IMAGES.numpy(),
        IMAGES[:, 0, 0],
        dict(t=torch.tensor(0.5), x=IMAGES),
        dict(inputs=list(IMAGES), data_samples=[object()] * 6),
        dict(inputs=[torch.zeros(3, 8 + i, 9) for i in range(6)]),
        dict(scale=torch.ones(4), mask=torch.ones(1, 1, 8, 8), inputs=IMAGES),
        (IMAGES, torch.ones(1, 8, 8)),
        dict(inputs=[IMAGES, IMAGES], data_samples=[]),  # two views of each, for contrastive training
        [IMAGES, 0.5, None],
        dict(t=0.5, x=IMAGES.tolist()),
        dict(size=[8, 8], x=IMAGES[:, 0, 0].tolist()),
        [f'{i}.jpg' for i in range(6)],
        [np.zeros((8, 8, 3)) for _ in range(6)],
        Sample(IMAGES, 'six'),
        dict(nested=[dict(images=(IMAGES,)), torch.tensor(1)]),
    ],
)
def test_the_number_of_images_of_a_batch(batch):
    assert count_images(batch) == 6


@pytest.mark.parametrize('batch', [0.5, dict(t=torch.tensor(1.0)), {}, object(), None, 'six'])
def test_a_batch_without_images_is_refused(batch):
    with pytest.raises(ValueError, match=type(batch).__name__):
        count_images(batch)


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, batch):
        return self.f(torch.as_tensor(batch['x'])) * batch['t']


@pytest.mark.parametrize('make', [lambda x: dict(t=torch.tensor(0.5), x=x), lambda x: dict(t=0.5, x=x.tolist())])
def test_batches_that_are_no_tensor(make):
    torch.manual_seed(0)
    plain = Dicts()
    model = converted(plain, make(data(2, 8).float()))
    source = collect_moments(model, [make(data(9, 8).float()), make(data(5, 8).float())])
    assert source['f'].count == 14
    target = data(30, 8, noisy=True).float()
    assert calibrate(model, [make(target)], 'domain', source).images == 30
    expected = plain.f.weight.double() @ source['f'].mean[0] + plain.f.bias.double()
    assert relative(model(make(target)).mean(0) / 0.5, expected.float()) < 1e-4, 'the mean is that of the source'


def test_no_image_is_refused_before_anything_changes():
    model = converted(nn.Sequential(nn.Linear(8, 4)).double(), data(1, 8))
    source, before = collect_moments(model, [data(9, 8)]), copy.deepcopy(model.state_dict())
    for batches in ([], [data(0, 8)], [data(0, 8)] * 2, iter([])):
        with pytest.raises(ValueError, match='no image'):
            calibrate(model, batches, 'domain', source)
    with pytest.raises(ValueError, match='no image'):
        collect_moments(model, [data(0, 8)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Several processes


def fit_in_process(rank, folder):
    """Fits three models of which the processes reach different layers; keeps weights and reports."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    case = torch.load(folder / 'case.pth', weights_only=False)
    results = {}
    for name, (model, source, batches) in case.items():
        gathered = collect_moments(model, batches[rank])
        report = calibrate(model, batches[rank], 'domain', source)
        results[name] = model.state_dict(), {k: v.state_dict() for k, v in gathered.items()}, list(report.skipped)
    torch.save(results, folder / f'rank{rank}.pth')
    torch.distributed.destroy_process_group()


def test_processes_that_reach_different_layers(tmp_path):
    """One process has large images, the other small ones or no batch; or a layer runs twice in one of them only."""
    small, large = data(9, 5, 8, noisy=True), data(9, 6, 8, noisy=True, seed=1)
    runs = {
        'one batch each': (Branch, [large], [small]),
        'several batches': (Branch, [large[:4], large[4:]], [small]),
        'no batch': (Branch, [large, small], []),
        'again': (Second, [large[:1, 0]], [large[:, 1]]),
    }
    case, expected = {}, {}
    for name, (make, *batches) in runs.items():
        torch.manual_seed(0)
        training = data(30, 6, 8, seed=3) if make is Branch else data(90, 8, seed=3)
        model = converted(make().double().eval(), training)
        source = collect_moments(model, [training])
        case[name] = model, source, batches
        model = copy.deepcopy(model)
        gathered = collect_moments(model, batches[0] + batches[1])
        calibrate(model, batches[0] + batches[1], 'domain', source)
        expected[name] = model.state_dict(), gathered
    torch.save(case, tmp_path / 'case.pth')
    torch.multiprocessing.spawn(fit_in_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in range(2))
    for name, (state, gathered) in expected.items():
        for key, value in state.items():
            assert torch.equal(first[name][0][key], second[name][0][key]), key
            assert (first[name][0][key] - value).abs().max() < 1e-9 * max(1, value.abs().max()), (name, key)
        for layer, moments in gathered.items():
            together = Moments.from_state_dict(first[name][1][layer])
            assert together.count == moments.count and relative(together.covariance, moments.covariance) < 1e-9
        assert first[name][2] == []


@pytest.mark.parametrize('rank', [None, 2])
def test_the_default_device_of_the_program_plays_no_part(rank, tmp_path):
    """Where tensors are made on another device by default (here one without memory), a model of the CPU stays there."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double(), torch.randn(64, 8).double()
    noisy = [1.5 * x + 0.5]
    with torch.device('meta'):
        apply_denoiserep(model, 'all', rank=rank, example_input=x[:1])
        with denoise_losses(model, tokens=5) as losses:
            model(x)
            assert losses.mean().item() > 0
        save_moments(collect_moments(model, [x]), tmp_path / 'moments.pth', {})
        source, _ = load_moments(tmp_path / 'moments.pth')
        calibrate(copy.deepcopy(model), noisy, 'domain', source)
        calibrate(model, noisy)
        assert verify_fusion(model, example_input=x).ok
        torch.save(model.state_dict(), tmp_path / 'in.pth')
        fuse_checkpoint(tmp_path / 'in.pth', tmp_path / 'out.pth')
    vanilla = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    vanilla.load_state_dict(torch.load(tmp_path / 'out.pth')['state_dict'])
    assert relative(vanilla(x), model(x)) < 1e-9

"""The vectors of a layer by image, and the halves of the images that differ most."""

import pytest
import torch
from torch import nn

from calibration_helpers import built, data, fit, gather
from helpers import relative
from mmdenoiserep.core import Moments
from mmdenoiserep.core.calibration.features import Features
from mmdenoiserep.core.calibration.halves import ImageVectors, main_direction
from mmdenoiserep.core.method.sample import Sample

KINDS = {
    'linear': (lambda: nn.Linear(6, 3), (7, 6)),
    'convolution': (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    'groups': (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 6)),
    'depthwise': (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 6)),
    'from its inputs': (lambda: nn.Conv2d(4, 6, 1), (4, 5, 6)),
}


def two_kinds(shape, count=12, seed=0, dtype=torch.float64):
    """Returns images of two kinds, in a random order, and which are of the first one."""
    kind = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) < count // 2
    images, offset = data(count, *shape, seed=seed), 4 * data(*shape[:-2], *[1] * len(shape[-2:-1]), shape[-1], seed=9)
    if len(shape) == 3:
        offset = 4 * data(shape[0], 1, 1, seed=9)
    return torch.where(kind.view(-1, *[1] * len(shape)), images + offset, 1.3 * images - offset).to(dtype), kind


def gathered(layer, batches, stride=1):
    seen = ImageVectors(Features(layer))
    for number, x in enumerate(batches):
        sample = Sample(seed=number, images=len(x))
        vectors = seen.features.vectors(sample, x, stride)
        seen.add(vectors, sample.parts(vectors.shape[2]))
    return seen


def moments_of(layer, x):
    """Returns the moments of what a fit corrects, from a plain forward."""
    if isinstance(layer, nn.Linear):
        return Moments.of(x.flatten(0, 1).mT[None])
    with torch.no_grad():
        return Moments.of(layer(x).transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1)))


def same(actual, expected, tolerance):
    return (
        actual.count == expected.count
        and relative(actual.mean, expected.mean) < tolerance
        and relative(actual.covariance, expected.covariance) < tolerance
    )


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize('batch', [12, 5, 1])
@pytest.mark.parametrize('kind', KINDS)
def test_two_kinds_of_images_are_told_apart(kind, batch, dtype, tolerance):
    """Whatever their order and the batches are; the moments are those of a plain forward of each kind."""
    make, shape = KINDS[kind]
    layer, (images, chosen) = built(make, dtype), two_kinds(shape, dtype=dtype)
    factor = moments_of(layer, data(40, *shape, seed=3, dtype=dtype)).factor(dtype)
    halves = gathered(layer, images.split(batch)).halves(factor)
    expected = moments_of(layer, images[chosen]), moments_of(layer, images[~chosen])
    assert any(
        all(same(a, b, tolerance) for a, b in zip(halves, order, strict=True)) for order in (expected, expected[::-1])
    )
    assert halves[0].mean.dtype == torch.float64


def test_images_of_different_sizes():
    """Each counts once in the order, and with all its vectors in the moments."""
    layer = built(lambda: nn.Conv2d(4, 6, 3))
    dark, light = [data(4, 4, *size, seed=size[0]) - 5 for size in ((5, 6), (9, 4))], [data(8, 4, 7, 7) + 5]
    factor = moments_of(layer, data(40, 4, 5, 5)).factor()
    halves = sorted(gathered(layer, [dark[0], *light, dark[1]]).halves(factor), key=lambda half: half.count)
    expected = [moments_of(layer, x) for x in (*dark, *light)]
    assert [half.count for half in halves] == [4 * (3 * 4 + 7 * 2), 8 * 5 * 5]
    assert same(halves[0], expected[0].merged(expected[1]), 1e-9) and same(halves[1], expected[2], 1e-9)


def test_tokens_that_do_not_divide_by_the_images_count_as_one_image():
    """Such as the tokens that a model keeps of each image by their content."""
    layer, factor = built(lambda: nn.Linear(6, 3)), Moments.of(data(1, 6, 200)).factor()
    seen = ImageVectors(Features(layer))
    batches = [data(11, 6) + 5, data(9, 6, seed=1) - 5, data(8, 6, seed=2) + 5]
    for x in batches:
        sample = Sample(images=4)
        seen.add(seen.features.vectors(sample, x, 1), sample.parts(len(x)))
    assert [part.shape[2] for part in seen.parts] == [1, 1, 4]
    halves = seen.halves(factor)
    assert {half.count for half in halves} == {9 + 6, 11 + 2} or {half.count for half in halves} == {9 + 4, 11 + 4}
    assert sum(half.count for half in halves) == 28


def test_no_vectors_are_no_image():
    """Such as those of an expert that a batch does not choose."""
    layer = built(lambda: nn.Linear(6, 3))
    seen = gathered(layer, [data(0, 4, 6), data(4, 0, 6), data(2, 4, 6)])
    assert [part.shape[2] for part in seen.parts] == [2]
    assert [half.count for half in seen.halves(Moments.of(data(1, 6, 99)).factor())] == [4, 4]
    assert [half.count for half in gathered(layer, []).halves(Moments.of(data(1, 6, 99)).factor())] == [0, 0]


def test_a_single_image_is_skipped():
    """Two are enough."""
    source = gather(built(lambda: nn.Sequential(nn.Linear(6, 3))), [data(40, 9, 6)])
    with pytest.raises(ValueError, match='0: a single image shows no difference between images'):
        fit(built(lambda: nn.Sequential(nn.Linear(6, 3))), [data(1, 90, 6, noisy=True)], source)
    (row,) = fit(built(lambda: nn.Sequential(nn.Linear(6, 3))), [data(2, 90, 6, noisy=True)], source).layers
    assert row.support.covariance > 0.5


def test_copies_of_an_image_are_not_halved():
    images = data(1, 5, 6).expand(7, -1, -1)
    layer = built(lambda: nn.Linear(6, 3))
    halves = gathered(layer, [images]).halves(Moments.of(data(1, 6, 99)).factor())
    assert [half.count for half in halves] == [0, 35]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_main_direction_is_that_of_a_decomposition(dtype):
    columns = (data(30, 200) + 3 * torch.outer(data(30, seed=1), data(200, seed=2))).to(dtype)
    expected, actual = torch.linalg.svd(columns).Vh[0], main_direction(columns)
    assert abs(expected @ actual).item() == pytest.approx(1, abs=1e-5)
    assert not main_direction(torch.zeros(4, 9)).any()


def test_vectors_hold_no_graph_of_gradients():
    layer, x = built(lambda: nn.Conv2d(4, 6, 3)), data(4, 4, 5, 5)
    with torch.enable_grad():
        seen = gathered(layer, [x], stride=2)
    assert not any(part.requires_grad for part in seen.parts)

"""mmdenoiserep.apis.corruptions: what an image becomes, for every depth and number of channels."""

import cv2
import numpy as np
import pytest

from mmdenoiserep.apis.corruptions import RANGES, corrupt, corrupt_folder, make_transform
from mmdenoiserep.core import InputError

SEVERITIES = dict(noise=0.1, blur=2.0, jpeg=10, contrast=0.5, occlusion=0.4, shot=0.05)
SEVERITIES |= dict(colour=0.5, haze=0.4, mixture=0.5, varying=0.3)
DRAWN = 'noise', 'shot', 'occlusion', 'mixture', 'varying'
CHANNELS = [(), (1,), (3,), (4,), (6,)]


def picture(channels=(3,), dtype=np.uint8, seed=0):
    most = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, most, (40, 50, *channels), dtype, endpoint=True)


@pytest.mark.parametrize('corruption', SEVERITIES)
def test_every_image_has_draws_of_its_own(corruption):
    image = picture()
    before = image.copy()
    seen = {(s, i): corrupt(image, corruption, SEVERITIES[corruption], s, i) for s in range(3) for i in range(3)}
    again = corrupt(image, corruption, SEVERITIES[corruption], 2, 1)
    assert np.array_equal(seen[2, 1], again) and np.array_equal(image, before)
    assert all(x.shape == image.shape and x.dtype == image.dtype and (x != image).any() for x in seen.values())
    different = len({x.tobytes() for x in seen.values()})
    assert different == (9 if corruption in DRAWN else 1)


@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('corruption', SEVERITIES)
def test_sixteen_bits_are_corrupted_as_eight_bits_are(corruption, channels):
    """A 16-bit image is 257 times the 8-bit one; so is what it becomes, but for the rounding of the latter."""
    image = picture(channels)
    deep = image.astype(np.uint16) * 257
    if corruption == 'jpeg':
        for refused, word in ((deep, '8-bit|channels'), (picture((6,)), '6')):
            with pytest.raises(InputError, match=word):
                corrupt(refused, corruption, 10, 0, 0)
        return
    if corruption == 'colour' and channels not in ((3,), (4,)):
        with pytest.raises(InputError, match='colour takes images of 3 channels'):
            corrupt(image, corruption, 0.5, 0, 0)
        return
    shallow, deep = (corrupt(x, corruption, SEVERITIES[corruption], 5, 7) for x in (image, deep))
    assert deep.dtype == np.uint16 and deep.shape == shallow.shape
    assert np.abs(deep / 257 - shallow.astype(float)).max() <= 0.51
    assert np.abs(shallow.astype(float) - image).mean() > 5


@pytest.mark.parametrize('severity', [0.01, 0.1])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', CHANNELS)
def test_noise_has_the_standard_deviation_that_was_asked_for(severity, dtype, channels):
    most = np.iinfo(dtype).max
    image = np.full((200, 200, *channels), most // 2, dtype)
    change = (corrupt(image, 'noise', severity, 0, 0).astype(float) - image) / most
    change = change.reshape(200 * 200, -1)
    if channels == (4,):
        assert not change[:, 3].any()
        change = change[:, :3]
    assert np.allclose(change.std(0), severity, rtol=0.03) and np.abs(change.mean(0)).max() < severity / 30
    correlations = np.corrcoef(change.T).reshape(change.shape[1], -1) - np.eye(change.shape[1])
    assert np.abs(correlations).max() < 0.03


@pytest.mark.parametrize('corruption', SEVERITIES)
def test_alpha_stays_and_the_colours_are_those_of_the_image_without_it(corruption):
    image = picture((4,))
    corrupted = corrupt(image, corruption, SEVERITIES[corruption], 1, 2)
    assert np.array_equal(corrupted[..., 3], image[..., 3])
    assert np.array_equal(corrupted[..., :3], corrupt(image[..., :3].copy(), corruption, SEVERITIES[corruption], 1, 2))


def test_colours_are_blue_first():
    blue = np.zeros((32, 32, 3), np.uint8)
    blue[..., 0] = 200
    corrupted = corrupt(blue, 'jpeg', 30, 0, 0).astype(float).mean((0, 1))
    assert corrupted[0] > 150 and corrupted[1:].max() < 60
    assert corrupt(blue, 'contrast', 0.5, 0, 0)[0, 0].tolist() == [100, 0, 0]
    assert corrupt(blue + 20, 'colour', 0.5, 0, 0)[0, 0].tolist() == [110, 20, 30]


def test_haze_adds_white_and_varying_noise_differs_by_image():
    grey = np.full((100, 100, 3), 100, np.uint8)
    assert abs(corrupt(grey, 'haze', 0.4, 0, 0).astype(int) - (0.6 * 100 + 0.4 * 255)).max() <= 1
    spreads = [corrupt(grey, 'varying', 0.2, 0, i).std() for i in range(20)]
    assert 0 < min(spreads) < 15 and 35 < max(spreads) < 0.2 * 255 * 1.05


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.int64])
def test_bytes_in_a_wider_type_are_bytes(dtype):
    """As LoadImageFromFile(to_float32=True) gives them."""
    image = picture()
    corrupted = corrupt(image.astype(dtype), 'noise', 0.1, 3, 4)
    assert corrupted.dtype == dtype and np.array_equal(corrupted, corrupt(image, 'noise', 0.1, 3, 4))


@pytest.mark.parametrize(
    'image',
    [
        np.linspace(0, 1, 300, dtype=np.float32).reshape(10, 10, 3),
        np.arange(300, dtype=np.float32).reshape(10, 10, 3),
        np.arange(300, dtype=np.int32).reshape(10, 10, 3) - 9,
        np.full((10, 10), np.nan),
        np.eye(10, dtype=bool),
    ],
)
def test_values_of_an_unknown_range_are_refused_and_pass_when_clean(image):
    with pytest.raises(InputError, match=str(image.dtype)):
        corrupt(image, 'blur', 1.0, 0, 0)
    assert corrupt(image, 'clean', 0, 0, 0) is image


@pytest.mark.parametrize('corruption', RANGES)
def test_severities_out_of_range_are_refused(corruption):
    least, most = RANGES[corruption]
    image = picture()
    for severity in (least, min(most, 200)):
        corrupted = corrupt(image, corruption, severity, 0, 0)
        assert corrupted.shape == image.shape
        assert np.array_equal(corrupted, image) or (corruption, severity) != ('blur', least), 'a faint blur is none'
    for severity in (least - 1, most * 2, np.nan, np.inf, 10.5 if corruption == 'jpeg' else -0.1):
        with pytest.raises(InputError, match=corruption):
            make_transform(corruption, severity, 0)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(corruption='foo'), "corruption must be one of noise, blur, .*, got 'foo'"),
        (dict(corruption='clean'), "corruption must be one of noise, blur, .*, got 'clean'"),
        (dict(corruption='noise', seed=-1), 'seed must be a whole number of 0 or more, got -1'),
        (dict(corruption='noise', severity=2), 'severity 2 does not work for noise'),
    ],
)
def test_arguments_that_do_not_work(arguments, words, tmp_path):
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), picture())
    with pytest.raises(InputError, match=words):
        corrupt_folder(tmp_path / 'images', tmp_path / 'out', **arguments)
    if 'severity' not in arguments and arguments['corruption'] != 'clean':
        with pytest.raises(InputError, match=words):
            corrupt(picture(), **dict(dict(severity=0.1, seed=0, number=0), **arguments))
    assert not (tmp_path / 'out').exists()

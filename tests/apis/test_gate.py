"""What speaks for the candidates of a fit, and which one is kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from calibration_helpers import data, gather
from mmdenoiserep.apis.agreement import Score
from mmdenoiserep.apis.candidates import CANDIDATES
from mmdenoiserep.apis.distances import Distances, measure_distances
from mmdenoiserep.apis.gate import Evidence, decide, explain_nothing, hold_out, is_local_damage, why_not_comparable
from mmdenoiserep.apis.images import Batches, NoImage
from mmdenoiserep.core import CalibrationError, InputError, Moments


def scored(*agreements, infomax=None, images=50):
    """Returns scores of the candidates whose agreement, of so many images, is in the first images."""
    found = {}
    for number, (name, agreement) in enumerate(zip(CANDIDATES, agreements, strict=False)):
        if agreement is not None:
            pairs = tuple((float(i < images * agreement), 1.0) for i in range(images))
            own = infomax[number] if infomax else None
            found[name] = Score(agreement, own, pairs, () if own is None else (own,) * images)
    return found


@pytest.mark.parametrize(
    ('scores', 'chosen'),
    [
        (scored(0.6, 0.6, 0.6, 0.6, 0.6), 'all'),
        (scored(0.6, 0.7, 0.8, 0.6, 0.9), 'all'),
        (scored(0.6, 0.6, 0.6, 0.5, 0.6), 'early'),  # 5 of 50 images less: 2.3 standard errors
        (scored(0.6, 0.6, 0.6, 0.54, 0.6), 'all'),  # 3 of 50: 1.8
        (scored(0.6, 0.6, 0.4, 0.4, 0.6), 'first'),
        (scored(0.6, 0.4, 0.4, 0.4, 0.6), 'half-strength'),
        (scored(0.6, 0.4, 0.4, 0.4, 0.4), 'nothing'),
        (scored(0.6, 0.4, 0.6), 'early'),
        (scored(0.6), 'nothing'),
        (scored(0.6, None, None, float('nan')), 'nothing'),
        (scored(1.0, 0.0, 0.0, 0.0, 0.0, images=2), 'all'),  # two images are no proof
        (scored(1.0, 0.0, 0.0, 0.0, 0.0, images=1), 'all'),
        (scored(0.6, 0.4, 0.4, 0.4, 0.4, infomax=[1.0, 1.1, 1.2, 0.9, 0.9]), 'early'),
        (scored(0.6, 0.4, 0.4, 0.4, 0.4, infomax=[1.0, 1.1, 1.2, 1.03, 0.9]), 'early'),  # 0.03: 1.5 standard errors
        (scored(0.6, 0.6, 0.6, 0.6, 0.6, infomax=[1.0, 0.97, 0.9, 0.9, 0.9]), 'first'),
        (scored(0.6, 0.6, 0.6, 0.6, 0.6, infomax=[1.0, 1 - 1e-9, 1 + 1e-9, 1.0, 1.0]), 'all'),
    ],
)
def test_the_choice(scores, chosen):
    assert decide(scores) == chosen
    assert decide(scores, Distances(3.0, 3.5)) == chosen
    assert decide(scores, Distances(float('nan'), float('nan'))) == chosen


def test_a_higher_infomax_outweighs_damage_in_places():
    damaged = Distances(1.07, 1.71)
    assert decide(scored(0.6, 0.7, 0.7, 0.7, 0.7), damaged) == 'nothing'
    assert decide(scored(0.6, 0.7, 0.7, 0.7, infomax=[1.0, 1.1, 0.9, 1.0]), damaged) == 'first'


def test_a_check_that_compares_nothing_refuses():
    nothing = Score(0.0, images=((0.0, 0.0),) * 20)
    found = dict(nothing=nothing, all=nothing)
    assert decide(found) == 'nothing' and 'finds nothing' in explain_nothing(Evidence(20, found))
    assert Evidence(9, found).doubt.startswith('9 held-out images') and not Evidence(10, found).doubt


def test_a_refusal_says_why():
    evidence = Evidence(50, scored(0.6, 0.4, 0.4), Distances(1.2, 1.3))
    assert 'agree less' in explain_nothing(evidence) and 'infomax' not in explain_nothing(evidence)
    assert '60.0%' in str(evidence) and '-20.0 ± 6.1' in str(evidence) and 'mean 1.30' in str(evidence)
    assert 'infomax' in explain_nothing(Evidence(50, scored(0.6, 0.6, infomax=[1.0, 0.9])))
    assert 'occlusion' in explain_nothing(Evidence(50, scored(0.2, 0.3), Distances(1.1, 9.0)))
    assert 'support no correction' in explain_nothing(Evidence(50, scored(0.2)))


@pytest.mark.parametrize('kernel', [1, 3])
def test_an_occlusion_is_seen_as_local_damage(kernel):
    """A kernel of 1 has fewer inputs than outputs, and its moments follow from those of the input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4 if kernel == 1 else 3, kernel, stride=kernel), nn.ReLU()).double()
    clean = data(8, 3, 24, 24)
    occluded, noisy = clean.clone(), clean + data(8, 3, 24, 24, seed=1)
    occluded[:, :, :6, :6] = 9.0
    source = gather(model, [clean])
    layers = {'0': model[0]}
    training = measure_distances(model, layers, [clean], source)
    if kernel == 3:
        assert training.mean == pytest.approx(3, rel=0.1), 'the number of channels'
    ratios = [measure_distances(model, layers, [x], source).relative_to(training) for x in (clean, noisy, occluded)]
    assert ratios[0] == (1, 1) and [is_local_damage(ratio) for ratio in ratios] == [False, False, True]
    unseen = dict(source, **{'0': Moments(*source['0'].mean.shape)})
    assert all(map(np.isnan, measure_distances(model, layers, [clean], unseen)))


def test_distances_in_metadata():
    assert Distances.read(dict(distances=dict(quartile=0.5, mean=1.5))) == (0.5, 1.5)
    assert Distances.read({}) is None and Distances.read(dict(distances=dict(quartile=0.5))) is None
    assert np.isnan(Distances(1.0, 1.0).relative_to(Distances(0.0, 1.0)).quartile)


class Model(nn.Module):
    """Has the smallest ``data_preprocessor``."""

    def data_preprocessor(self, packed, training=False):
        return dict(inputs=torch.stack(packed['inputs']))


def subject(count, model=None):
    images = [dict(inputs=torch.full((1, 2, 2), i)) for i in range(count)]
    model = model or Model()
    return SimpleNamespace(model=model, images=Batches(model, Subset(images, range(count)), 4))


@pytest.mark.parametrize(('count', 'expected'), [(3, 1), (9, 1), (10, 2), (1000, 200), (2000, 200)])
def test_a_fifth_of_the_images_is_held_out(count, expected):
    some = subject(count)
    held = hold_out(some)
    numbers = [[int(image[0, 0, 0]) for batch in batches for image in batch] for batches in (held, some.images)]
    assert len(numbers[0]) == expected and sorted([*numbers[0], *numbers[1]]) == list(range(count))
    assert [i * expected // count for i in numbers[0]] == list(range(expected)), 'one of each stretch'


def test_held_out_images_that_are_all_left_out():
    """The config's data set returns none of them."""
    some = subject(10)
    held = hold_out(some)
    held.dataset.dataset[:] = [NoImage(f'image {i} is left out by Filter', left_out=True) for i in range(10)]
    with pytest.raises(InputError, match=r'no held-out image is left: image \d is left out by Filter'):
        list(held)


@pytest.mark.parametrize('count', [1, 2])
def test_two_images_are_too_few(count):
    with pytest.raises(CalibrationError, match='three images'):
        hold_out(subject(count))


def test_models_without_predictions_to_compare():
    class Odd(Model):
        def test_step(self, packed):
            return [SimpleNamespace(pred_depth=1)]

    failing = Model()
    failing.test_step = torch.relu
    failed = 'Model for an image and its mirrored image fail (TypeError: '
    for model, words in ((Model(), 'no test_step'), (Odd(), 'have none of pred_feature'), (failing, failed)):
        some = subject(4, model)
        assert words in why_not_comparable(some, some.images)


def test_a_model_of_the_user_that_fails_keeps_its_traceback():
    class Failing(Model):
        def test_step(self, packed):
            raise NotImplementedError

    some = subject(4, Failing())
    with pytest.raises(NotImplementedError):
        why_not_comparable(some, some.images)

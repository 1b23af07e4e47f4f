"""The candidates of a fit, what speaks for them, and which one is kept."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn
from torch.utils.data import Subset

from calibration_helpers import LAYERS, Net, data, fit, gather
from helpers import copied
from mmdenoiserep.apis.distances import Distances, measure_distances
from mmdenoiserep.apis.gate import (
    CANDIDATES,
    HALF_STRENGTH,
    PARTS,
    Candidates,
    Evidence,
    Score,
    Tally,
    decide,
    explain_nothing,
    hold_out,
    is_local_damage,
    layers_of,
    predict,
    tally,
    why_not_comparable,
)
from mmdenoiserep.apis.images import Batches
from mmdenoiserep.core import CalibrationError, Moments

CLEAN = [data(100, 3, 6, 6, seed=seed) for seed in (20, 21)]
BLURRED = [x + x.roll(1, 2) + x.roll(1, 3) + 0.5 for x in (data(100, 3, 6, 6, seed=seed) for seed in (22, 23))]


def fitted(names=LAYERS, images=BLURRED):
    """Returns a model in float64 before and after the fit of some layers, and the candidates."""
    torch.manual_seed(0)
    model = Net().double().eval()
    source = gather(model, CLEAN)
    before = deepcopy(model)
    candidates = Candidates(model, {name: model.get_submodule(name) for name in names})
    fit(model, images, source, names, progress=candidates.note)
    return before, model, candidates


def distance(state, other):
    return max((value - other[key]).abs().max().item() for key, value in state.items() if value.is_floating_point())


def test_parts_of_the_layers():
    """Half of an odd number has the middle one."""
    layers = dict.fromkeys('abcde')
    parts = [''.join(layers_of(layers, part)) for part in PARTS]
    assert parts == ['a', 'abc', 'abcde'] and list(layers_of(dict(a=1, b=2), 'early')) == ['a']


@pytest.mark.parametrize(('name', 'names'), [('first', LAYERS[:1]), ('early', LAYERS[:3]), ('all', LAYERS)])
def test_a_candidate_is_the_fit_of_its_layers(name, names):
    """With what norms take of layers without a bias: a BatchNorm's running mean, a LayerNorm's bias."""
    before, model, candidates = fitted()
    assert candidates.names(name) == names
    candidates.apply('nothing')
    assert distance(model.state_dict(), before.state_dict()) == 0
    candidates.apply(name)
    _, expected, _ = fitted(names)
    assert distance(model.state_dict(), expected.state_dict()) < 1e-9
    assert distance(model.state_dict(), before.state_dict()) > 1e-3
    owners = {layer: {candidates.owned[number][0] for number in changed} for layer, changed in candidates.after.items()}
    assert owners['conv1'] == {'conv1', 'bn1'} and owners['conv3'] == {'conv3', 'bn3'}
    assert owners['fc1'] == {'fc1', 'norm'} and owners['conv2'] == {'conv2'}


def test_equal_candidates_are_looked_at_once():
    before, model, candidates = fitted()
    assert candidates.distinct() == list(CANDIDATES)
    for name in (LAYERS[0], *LAYERS[3:]):
        candidates.after[name] = {}  # nothing had support there
    assert candidates.distinct() == ['nothing', 'early', HALF_STRENGTH]
    assert Candidates(before, dict(before.named_children())).distinct() == ['nothing']


def test_half_strength_is_the_mean_of_the_weights():
    before, model, candidates = fitted()
    everything = copied(model.state_dict())
    candidates.apply('first')
    candidates.apply(HALF_STRENGTH)
    start = before.state_dict()
    assert distance(everything, start) > 1e-3
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, torch.lerp(start[key].double(), everything[key].double(), 0.5).to(value))


def test_another_pass_replaces_the_first_one():
    before, model, candidates = fitted()
    expected = copied(model.state_dict())
    candidates.apply('nothing')
    fit(model, [2 * image for image in BLURRED], gather(before, CLEAN), progress=candidates.note)
    candidates.apply('nothing')
    fit(model, BLURRED, gather(before, CLEAN), progress=candidates.note)
    candidates.apply('nothing')
    candidates.apply('all')
    assert distance(model.state_dict(), expected) == 0


def score(*pairs):
    """Returns the score of pairs of predictions, for images and mirrored images."""
    whole = Tally()
    for pair in pairs:
        whole.add(tally(*pair))
    assert whole.images == len(pairs)
    found = whole.score()
    agreed, total = map(sum, zip(*found.images, strict=True))
    assert len(found.images) == len(pairs) and found.agreement == (agreed / total if total else 0)
    return found


def labelled(*values):
    return DataSample().set_pred_score(torch.tensor(values))


def test_classes_agree_where_the_highest_scores_do():
    sure, other, unsure = labelled(1.0, 0.0), labelled(0.0, 1.0), labelled(0.5, 0.5)
    agreement, infomax, *_ = score((sure, sure), (other, other), (sure, other), (other, labelled(0.1, 0.9)))
    assert agreement == 0.75 and infomax == pytest.approx(np.log(2))
    assert score((sure, sure), (sure, sure))[:2] == (1, 0), 'one class for all images says nothing'
    assert score((unsure, unsure)).infomax == pytest.approx(0)
    several = labelled(0.9, 0.8)
    assert score((several, several))[:2] == (1, None), 'the scores of several labels are no probabilities of classes'


def segmented(*rows):
    return SegDataSample(pred_sem_seg=PixelData(data=torch.tensor([rows])))


def test_pixels_agree_where_those_of_the_mirrored_image_do():
    image = segmented([0, 1], [0, 1])
    assert score((image, segmented([1, 0], [1, 1])))[:2] == (0.75, None)
    assert score((image, segmented([1, 0], [1, 0])), (image, image))[:2] == (0.5, None)


def detected(*rows, width=100):
    boxes, labels, scores = (
        torch.tensor([row[:4] for row in rows]).view(-1, 4),
        [r[4] for r in rows],
        [r[5] for r in rows],
    )
    sample = DetDataSample(metainfo=dict(ori_shape=(50, width)))
    sample.pred_instances = InstanceData(bboxes=boxes, labels=torch.tensor(labels), scores=torch.tensor(scores))
    return sample


def test_boxes_agree_with_one_of_their_class_by_score():
    left, right = (0.0, 0.0, 10.0, 10.0), (90.0, 0.0, 100.0, 10.0)
    image = detected((*left, 0, 0.9), (*right, 1, 0.3))
    assert score((image, detected((*right, 0, 0.5)))).agreement == pytest.approx((0.9 + 0.5) / (0.9 + 0.3 + 0.5))
    assert score((image, detected((*right, 1, 0.5)))).agreement == 0, 'of another class'
    assert score((image, detected((*left, 0, 0.5)))).agreement == 0, 'at another place'
    assert score((image, detected((94.0, 0.0, 100.0, 10.0, 0, 0.9)))).agreement == pytest.approx(1.8 / 2.1)
    assert score((image, detected((96.0, 0.0, 100.0, 10.0, 0, 0.9)))).agreement == 0, 'overlaps by 0.4'
    twice = detected((*right, 0, 0.9), (*right, 0, 0.9))
    assert score((image, twice)).agreement == pytest.approx(1.8 / 3.0), 'a box agrees once'
    assert score((image, detected())).agreement == 0 and score((detected(), image)).agreement == 0
    assert score((detected(), detected()))[:2] == (0, None), 'finding nothing is no agreement'


def test_predictions_that_are_not_finite_do_not_agree():
    nan = labelled(float('nan'), 0.5)
    assert score((nan, nan)).agreement == 0


def test_pixels_of_mmdet_are_compared():
    sample = DetDataSample(pred_sem_seg=PixelData(sem_seg=torch.tensor([[[0, 1]]])))
    other = DetDataSample(pred_sem_seg=PixelData(sem_seg=torch.tensor([[[1, 1]]])))
    assert score((sample, other)).agreement == 0.5


@pytest.mark.parametrize(('height', 'scale'), [(20, 1.0), (40, 0.5)])
def test_padding_is_not_mirrored(height, scale):
    """A column that the pipeline pads on the right stays there."""
    seen = []

    def test_step(packed):
        seen.append(packed['inputs'][0])
        return packed['data_samples']

    sample = DetDataSample(metainfo=dict(ori_shape=(height, height), scale_factor=(scale, scale)))
    image = torch.arange(32.0).expand(3, 32, 32)
    predict(SimpleNamespace(test_step=test_step), dict(inputs=[image], data_samples=[sample]), mirror=True)
    predict(SimpleNamespace(test_step=test_step), dict(inputs=[image], data_samples=[DetDataSample()]), mirror=True)
    assert seen[0][0, 0].tolist() == [*range(19, -1, -1), *range(20, 32)]
    assert seen[1][0, 0].tolist() == list(range(31, -1, -1)), 'nothing is known of a padding'


def test_features_agree_where_the_mirrored_image_is_nearest():
    def seen(*values):
        sample = DataSample()
        sample.set_field(torch.tensor(values), 'pred_feature', dtype=torch.Tensor)
        return sample

    pairs = (seen(1.0, 0.0), seen(9.0, 1.0)), (seen(0.0, 1.0), seen(0.1, 2.0)), (seen(1.0, 1.0), seen(0.0, 5.0))
    assert score(*pairs)[:2] == (pytest.approx(2 / 3), None)


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
    assert decide(scores, Distances(3.0, 4.0)) == chosen
    assert decide(scores, Distances(float('nan'), float('nan'))) == chosen


def test_a_higher_infomax_outweighs_damage_in_places():
    damaged = Distances(1.07, 1.71)
    assert decide(scored(0.6, 0.7, 0.7, 0.7, 0.7), damaged) == 'nothing'
    assert decide(scored(0.6, 0.7, 0.7, 0.7, infomax=[1.0, 1.1, 0.9, 1.0]), damaged) == 'first'
    assert decide(scored(0.6, 0.7), Distances(1.07, 1.71, 0.2)) == 'first', 'the mean may be 1.3'


def test_the_error_of_a_change_is_that_of_a_ratio_of_sums():
    """Against many draws of images: 400 images with boxes, of which a part agrees, more after a fit."""
    rng = np.random.default_rng(0)

    def draw():
        total = rng.uniform(0, 3, 400)
        before = rng.uniform(0, 0.6, 400)
        pairs = [tuple(zip(share * total, total, strict=True)) for share in (before, before + rng.uniform(0, 0.4, 400))]
        return [Score(sum(a for a, _ in images) / sum(t for _, t in images), images=images) for images in pairs]

    changes = np.array([after.change_from(before) for before, after in (draw() for _ in range(300))])
    assert changes[:, 0].mean() == pytest.approx(0.2, abs=0.005)
    assert changes[:, 1].mean() == pytest.approx(changes[:, 0].std(), rel=0.15)
    both = Score(0.5, images=((1.0, 1.0), (0.0, 1.0)))
    assert both.change_from(both) == (0, 0.5**0.5), 'two images are no proof'
    assert Score(0.0).change_from(Score(0.0)) == (0, np.inf)


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
    assert ratios[0][:2] == (1, 1) and [is_local_damage(ratio) for ratio in ratios] == [False, False, True]
    unseen = dict(source, **{'0': Moments(*source['0'].mean.shape)})
    assert all(map(np.isnan, measure_distances(model, layers, [clean], unseen)))


def test_distances_in_metadata():
    assert Distances.read(dict(distances=dict(quartile=0.5, mean=1.5, error=0.1))) == (0.5, 1.5, 0.1)
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

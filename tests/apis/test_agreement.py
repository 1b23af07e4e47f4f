"""What agrees in predictions for images and mirrored images, and the errors of the agreement."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mmdenoiserep.apis.agreement import Score, Tally, predict, tally


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

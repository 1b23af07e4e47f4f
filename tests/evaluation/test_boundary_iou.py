"""Tests of boundary IoU: masks worked out by hand, explicit loops as the reference, and mmseg's own evaluation."""

import cv2
import mmseg.datasets
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import TRANSFORMS
from mmseg.structures import SegDataSample

from mmdenoiserep.evaluation.boundary_iou import BoundaryIoUMetric

IGNORED = 255


def areas(prediction, truth, num_classes=2, ratio=0.02):
    """Return intersection, union, contour of the prediction and of the truth, as lists of pixels by class."""
    metric = BoundaryIoUMetric(dilation_ratio=ratio)
    maps = (torch.as_tensor(np.asarray(labels, dtype=np.int64)) for labels in (prediction, truth))
    return [area.tolist() for area in metric.intersect_and_union(*maps, num_classes, metric.ignore_index)]


def evaluate(pairs, classes, *metrics):
    with DefaultScope.overwrite_default_scope('mmseg'):
        evaluator = Evaluator(list(metrics))
    evaluator.dataset_meta = dict(classes=classes)
    samples = [
        SegDataSample(
            pred_sem_seg=PixelData(data=torch.as_tensor(np.asarray(prediction))[None].long()),
            gt_sem_seg=PixelData(data=torch.as_tensor(np.asarray(truth))[None].long()),
        )
        for prediction, truth in pairs
    ]
    for start in range(0, len(samples), 2):
        evaluator.process(samples[start : start + 2])
    return evaluator.evaluate(len(samples))


def square(left, top=2, side=4):
    labels = np.zeros((8, 8), np.int64)
    labels[top : top + side, left : left + side] = 1
    return labels


def test_perfect():
    """The 4 x 4 square has a contour of 12; every pixel of the background is at the image border or at the square."""
    assert areas(square(2), square(2)) == [[48, 12]] * 4


def test_shifted_by_one():
    """The square one pixel to the right.

    Class 1: rings of 12 pixels; in common are columns 3 to 5 of rows 2 and 5, so 6. 6 / (12 + 12 - 6) = 1 / 3.
    Class 0: the annotation has a contour of 48. In the prediction 6 pixels, column 1 of rows 1 to 6, touch neither the
    square, which starts in column 3, nor the image border: 42. Background in both maps are 64 - 20 = 44 pixels, less
    those 6: 38. 38 / (48 + 42 - 38) = 38 / 52.
    """
    prediction, truth = square(3), square(2)
    assert areas(prediction, truth) == [[38, 6], [52, 18], [42, 12], [48, 12]]
    expected = round(100 * (1 / 3 + 38 / 52) / 2, 2)
    assert evaluate([(prediction, truth)], 'ab', dict(type='BoundaryIoUMetric')) == {'mBIoU': expected}


def test_wrong_class_in_the_right_place():
    assert areas(2 * square(2), square(2), 3) == [[48, 0, 0], [48, 12, 12], [48, 0, 12], [48, 12, 0]]


@pytest.mark.parametrize(
    ('labels', 'contour'),
    [
        (np.zeros((8, 8)), [28, 0]),  # 64 less the 6 x 6 inside
        (square(0, 0), [28, 12]),  # 16 less 2 x 2; 48 less the 6 x 6 - 4 x 4 that touch neither border nor square
    ],
)
def test_image_border_is_a_contour(labels, contour):
    assert areas(labels, labels)[3] == contour


def test_thin_object_is_all_contour():
    """A stripe of two rows has no inside, so its boundary IoU is its IoU: 8 / 24."""
    truth, prediction = np.zeros((2, 8, 8), np.int64)
    truth[3:5] = prediction[4:6] = 1
    plain = IoUMetric.intersect_and_union(torch.tensor(prediction), torch.tensor(truth), 2, IGNORED)
    boundary = areas(prediction, truth)
    assert [area[1] for area in boundary] == [area[1].item() for area in plain] == [8, 24, 16, 16]
    assert boundary[0][0] < plain[0][0].item()


def test_everything_within_d_is_plain_iou():
    generator = np.random.default_rng(0)
    prediction, truth = generator.integers(0, 4, (2, 9, 7))
    plain = IoUMetric.intersect_and_union(torch.tensor(prediction), torch.tensor(truth), 4, IGNORED)
    assert areas(prediction, truth, 4, ratio=0.5) == [area.tolist() for area in plain]


def eroded(mask, distance):
    """Erode a binary mask by a square; outside of the image there is nothing."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            result[y, x] = all(
                0 <= y + dy < height and 0 <= x + dx < width and mask[y + dy, x + dx]
                for dy in range(-distance, distance + 1)
                for dx in range(-distance, distance + 1)
            )
    return result


def reference(prediction, truth, num_classes, distance):
    """Compute the four areas from one pair of binary masks a class."""
    counted = truth != IGNORED
    result = []
    for label in range(num_classes):
        masks = [(labels == label) & counted for labels in (prediction, truth)]
        ours, theirs = (mask & ~eroded(mask, distance) for mask in masks)
        result.append([(ours & theirs).sum(), (ours | theirs).sum(), ours.sum(), theirs.sum()])
    return np.transpose(result).tolist()


@pytest.mark.parametrize(
    'shape, ratio, distance',
    [
        ((24, 32), 0.02, 1),  # diagonal 40: 0.8
        ((24, 32), 0.01, 1),  # 0.4, at least 1
        ((24, 32), 0.05, 2),
        ((24, 32), 0.07, 3),  # 2.8
        ((17, 5), 0.1, 2),  # 1.77
        ((5, 30), 0.2, 6),  # higher than the image
    ],
)
def test_against_explicit_loops(shape, ratio, distance):
    generator = np.random.default_rng(distance)
    classes = generator.choice(200, 6, replace=False)
    classes[0] = 199
    patches = np.kron(generator.integers(0, 6, (4, 5)), np.ones((7, 7), np.int64))
    truth, prediction = (classes[p][: shape[0], : shape[1]] for p in (patches, np.roll(patches, 2, 1)))
    noise = generator.random(shape)
    prediction = np.where(noise < 0.02, classes[1], prediction)
    truth = np.where(noise > 0.97, IGNORED, truth)
    expected = reference(prediction, truth, 200, distance)
    assert sum(expected[0]) > 0 and (truth == IGNORED).any()
    assert areas(prediction, truth, 200, ratio) == expected


def test_ignored_pixels():
    truth = square(2)
    truth[:, :3] = IGNORED
    prediction = square(3)
    expected = areas(prediction, truth)
    assert expected == reference(prediction, truth, 2, 1)
    for label in (0, 1):
        prediction[:, :3] = label
        assert areas(prediction, truth) == expected
    assert areas(prediction, np.full((8, 8), IGNORED)) == [[0, 0]] * 4


def test_another_ignore_index():
    """Then 255 is a class like any other, also where there are more classes than a byte holds."""
    labels = torch.full((8, 8), 255)
    result = BoundaryIoUMetric(ignore_index=-1).intersect_and_union(labels, labels, 300, -1)
    assert [area.nonzero().tolist() for area in result] == [[[255]]] * 4
    assert [area.sum().item() for area in result] == [28] * 4
    labels[:, :4] = -1
    result = BoundaryIoUMetric(ignore_index=-1).intersect_and_union(torch.full((8, 8), 299), labels, 300, -1)
    assert result[2][299] == 20 and result[3][255] == 20  # 8 x 4 less the 6 x 2 inside


def test_areas_are_summed_over_images_of_any_size():
    generator = np.random.default_rng(1)
    pairs = []
    for height, width in ((8, 8), (40, 30), (64, 64)):
        patches = np.kron(generator.integers(0, 3, (2, 11, 11)), np.ones((1, 6, 6), np.int64))
        pairs.append(patches[:, :height, :width])
    total = np.sum([reference(p, t, 3, d) for (p, t), d in zip(pairs, (1, 1, 2), strict=True)], axis=0)
    result = evaluate(pairs, 'abcd', dict(type='BoundaryIoUMetric'))
    assert result == {'mBIoU': pytest.approx(100 * (total[0] / total[1]).mean(), abs=0.006)}


def test_beside_the_plain_metric(tmp_path):
    generator = np.random.default_rng(2)
    stored = np.kron(generator.integers(1, 151, (3, 4)), np.ones((9, 9), np.int64))
    stored[:9, :9] = 0
    cv2.imwrite(str(tmp_path / 'annotation.png'), stored)
    load = TRANSFORMS.build(dict(type='LoadAnnotations', reduce_zero_label=True))
    loaded = load(dict(seg_map_path=str(tmp_path / 'annotation.png'), reduce_zero_label=True, seg_fields=[]))
    truth = loaded['gt_seg_map']
    assert np.array_equal(truth, np.where(stored == 0, IGNORED, stored - 1))
    prediction = np.roll(np.where(truth == IGNORED, 3, truth), 2, 1)
    classes = mmseg.datasets.ADE20KDataset.METAINFO['classes']
    plain = dict(type='IoUMetric', iou_metrics=['mIoU'])
    alone = evaluate([(prediction, truth)], classes, plain)
    both = evaluate([(prediction, truth)], classes, plain, dict(type='BoundaryIoUMetric'))
    intersection, union, *_ = reference(prediction, truth.astype(np.int64), 150, 1)
    occurring = np.array(union) > 0
    expected = 100 * (np.array(intersection)[occurring] / np.array(union)[occurring]).mean()
    assert both == {**alone, 'mBIoU': pytest.approx(expected, abs=0.006)}
    assert alone.keys() == {'aAcc', 'mIoU', 'mAcc'}
    assert 0 < both['mBIoU'] < both['mIoU']


def test_registered_in_the_root():
    for scope in (None, 'mmseg', 'mmdet'):
        assert type(METRICS.build(dict(type='BoundaryIoUMetric', _scope_=scope))) is BoundaryIoUMetric


@pytest.mark.parametrize('ratio', [0, -0.02, float('nan')])
def test_ratio_must_be_positive(ratio):
    with pytest.raises(ValueError, match='dilation_ratio of BoundaryIoUMetric must be positive'):
        BoundaryIoUMetric(dilation_ratio=ratio)

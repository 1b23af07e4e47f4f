"""Boundary IoU for semantic segmentation."""

import math
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric
from numpy.typing import NDArray
from torch import Tensor


@METRICS.register_module()
class BoundaryIoUMetric(IoUMetric):
    """Mean boundary IoU (Cheng et al., CVPR 2021, arXiv 2103.16562): IoU of the inner contours, ``mBIoU`` in percent.

    For the mask G of a class in the annotation and its mask P in the prediction, with ``M_d`` the pixels within d
    pixels of the contour of M,

        ``BIoU = |(G_d & G) & (P_d & P)| / |(G_d & G) | (P_d & P)|``,   ``d = max(1, round(dilation_ratio * diagonal))``

    with the diagonal of the image, in pixels of the map that is evaluated. ``M_d & M`` is M less its erosion by a
    square of side 2 d + 1, with everything outside the image counted as another class: distances are Chebyshev
    distances, and the border of the image is a contour.

    The paper defines it for one pair of masks. For semantic segmentation the two areas are summed over the data set for
    each class, then divided, and the ratios averaged over the classes that occur, as mmseg does for mIoU.

    Ignored pixels are never counted. Both maps get one further class there before the erosion, so the rim of an ignored
    region is a contour in both. ``reduce_zero_label`` needs nothing here: it is applied where annotations are loaded.

    Args:
        dilation_ratio: d over the diagonal; 0.02 is the paper's.
        ignore_index: Annotated value of the pixels to leave out.
        collect_device: Where the results of several processes are gathered, ``'cpu'`` or ``'gpu'``.
        prefix: Put before the name of the result.

    Raises:
        ValueError: dilation_ratio is not positive.
    """

    def __init__(
        self,
        dilation_ratio: float = 0.02,
        ignore_index: int = 255,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        if not dilation_ratio > 0:
            raise ValueError(f'dilation_ratio of BoundaryIoUMetric must be positive, got {dilation_ratio}')
        super().__init__(ignore_index=ignore_index, collect_device=collect_device, prefix=prefix)
        self.dilation_ratio = dilation_ratio

    def intersect_and_union(
        self, pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> tuple[Tensor, ...]:
        """Returns the areas in pixels, each (num_classes,): intersection and union, then both inner contours.

        Args:
            pred_label: Predicted classes, (H, W), on any device.
            label: Annotated classes, (H, W).
            num_classes: Number of classes, at most 65534.
            ignore_index: Annotated value of the pixels to leave out.
        """
        ignored = label == ignore_index
        prediction, truth = (
            labels.long().masked_fill(ignored, num_classes).cpu().numpy().astype(np.uint16)
            for labels in (pred_label, label)
        )
        width = max(1, round(self.dilation_ratio * math.hypot(*truth.shape)))
        on_prediction, on_truth = contour(prediction, width), contour(truth, width)

        hit = on_prediction & on_truth & (prediction == truth)
        intersection, prediction_area, truth_area = (
            torch.from_numpy(np.bincount(classes, minlength=num_classes)[:num_classes])
            for classes in (truth[hit], prediction[on_prediction], truth[on_truth])
        )
        return intersection, prediction_area + truth_area - intersection, prediction_area, truth_area

    @staticmethod
    def total_area_to_metrics(
        total_area_intersect: Tensor, total_area_union: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, NDArray]:
        """Returns the boundary IoU of every class; NaN where a class does not occur."""
        return {'BIoU': (total_area_intersect / total_area_union).numpy()}


def contour(labels: NDArray[np.uint16], width: int) -> NDArray[np.bool_]:
    """Returns where the square of side 2 width + 1 around a pixel holds another class or leaves the map.

    These are the inner contours of all classes at once, since every pixel belongs to one class.
    """
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    highest = cv2.dilate(labels, square, borderType=cv2.BORDER_CONSTANT, borderValue=np.iinfo(np.uint16).max)
    return highest != cv2.erode(labels, square)

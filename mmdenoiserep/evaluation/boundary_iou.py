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
    """Mean boundary IoU (Cheng et al., CVPR 2021, arXiv 2103.16562): ``mBIoU``, the IoU of inner contours, in percent.

    For the annotated mask G and the predicted mask P of a class, with ``M_d`` the pixels within d pixels of the contour
    of M,

        ``BIoU = |(G_d & G) & (P_d & P)| / |(G_d & G) | (P_d & P)|``,   ``d = max(1, round(dilation_ratio * diagonal))``

    where diagonal is that of the evaluated map in pixels. ``M_d & M`` is M minus its erosion by a square of side
    2 d + 1, so distances are Chebyshev distances. Pixels outside the image count as another class, so the border of the
    image is a contour.

    The paper defines boundary IoU for one pair of masks. For semantic segmentation, intersection and union of each
    class are summed over the data set and divided, and the ratios are averaged over the classes that occur, as mmseg
    does for mIoU.

    Ignored pixels are not counted. They form an additional class in both maps before the erosion, so the border of an
    ignored region is a contour in both. ``reduce_zero_label`` is applied when annotations are loaded.

    Args:
        dilation_ratio: d over the diagonal; the paper uses 0.02.
        ignore_index: Label of ignored pixels.
        collect_device: Device to gather the results of several processes on, ``'cpu'`` or ``'gpu'``.
        prefix: Prefix of the name of the metric.

    Raises:
        ValueError: ``dilation_ratio`` is not positive.
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
        """Returns areas in pixels by class: intersection, union, predicted and annotated contour, (num_classes,) each.

        Args:
            pred_label: Predicted classes, (H, W), on any device.
            label: Annotated classes, (H, W).
            num_classes: Number of classes, at most 65534.
            ignore_index: Label of ignored pixels.
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
    """Returns the inner contours of all classes, (H, W): pixels within ``width`` of another class or of the border.

    Args:
        labels: Class of each pixel, (H, W).
        width: Chebyshev distance in pixels.
    """
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    highest = cv2.dilate(labels, square, borderType=cv2.BORDER_CONSTANT, borderValue=np.iinfo(np.uint16).max)
    return highest != cv2.erode(labels, square)

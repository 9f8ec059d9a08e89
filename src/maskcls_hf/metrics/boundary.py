"""Boundary IoU of semantic maps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..models.run_lengths import Runs, as_array, overlay
from .mean_iou import ClassMap, SemanticCounts, check_ids, check_sizes
from .metric import register_metric

_NONE = -1


@register_metric("boundary_iou")
class BoundaryIoU(SemanticCounts):
    """IoU of the pixels near the boundaries (Cheng, Girshick, Dollar, Berg, Kirillov, CVPR 2021, Eq. 2).

    Of a class, G are the true pixels of an image and P the predicted ones. G_d, the boundary pixels of G, are those
    with a pixel outside G, or outside the image, at most d rows and d columns away: what d erosions by a square of
    3 x 3 pixels remove, as in the authors' code. d is `width` times the diagonal of the image in pixels, rounded, at
    least 1. P_d likewise. With sums over the images of the data set, as for the mean IoU,

        boundary IoU of a class = sum |G_d & P_d| / sum |G_d | P_d|

    and the score is the mean over the classes that occur. The paper defines it for single masks, which hold no void;
    here void pixels count in neither map and make no boundary.

    Args:
        id2label: names of the K classes, ids 0..K-1.
        stuff_ids: not looked at; all metrics take it.
        void_id: as for `SemanticCounts`.
        width: of the boundary, as a part of the diagonal of the image.
    """

    tasks = ("semantic",)
    switch = "boundary"

    def __init__(
        self,
        id2label: Mapping[int, str],
        stuff_ids: Collection[int] = (),
        void_id: int | None = None,
        width: float = 0.02,
    ):
        super().__init__(id2label, stuff_ids, void_id)
        self.width = width

    def measure(self, found: ClassMap, true: ClassMap) -> Tensor:
        """Counts (3, K) of the boundary pixels of one image; arguments and errors of `MeanIoU.measure`."""
        check_sizes(found, true)
        maps = (self.class_map(found, "Prediction"), self.class_map(true, "Target"))
        of_prediction, of_truth = (as_array(one.semantic_map(self.void_id)) for one in maps)
        void = of_truth == self.void_id
        check_ids(of_prediction[~void], "Prediction", len(self.names), self.void_id)
        check_ids(of_truth[~void], "Target", len(self.names))
        distance = max(1, round(self.width * math.hypot(*void.shape)))
        boundaries = [Runs.of(self._boundary(ids, void, distance)) for ids in (of_prediction, of_truth)]
        return self.counts(*overlay(*boundaries))

    def _boundary(self, ids: NDArray[Any], void: NDArray[np.bool_], distance: int) -> NDArray[np.int32]:
        """Map (H, W) with the class of boundary pixels, `_NONE` elsewhere.

        One lowest and one highest id of each window serve all classes: they are equal where the window has one class.
        """
        ids = ids.astype(np.int32)
        no_class = len(self.names)
        ids[ids == self.void_id] = no_class  # of predictions; that of targets is void
        size = 2 * distance + 1
        lowest = ndimage.minimum_filter(np.where(void, no_class, ids), size, mode="constant", cval=-1)
        highest = ndimage.maximum_filter(np.where(void, -1, ids), size, mode="constant", cval=-1)
        boundary = (lowest != ids) | (highest != ids)
        return np.where(boundary & ~void & (ids != no_class), ids, _NONE)

    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`boundary_iou` of each class."""
        return {"boundary_iou": self.iou(sums)}

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`boundary_iou`, the mean over the classes that occur."""
        return {"boundary_iou": self.iou(sums).nanmean(-1)}

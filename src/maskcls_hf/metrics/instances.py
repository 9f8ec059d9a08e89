"""F1 of predicted instances at one IoU threshold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..models.run_lengths import as_array
from ..models.segments import Segments
from .metric import SummedMetric, check_sizes, register_metric, things


def _mask_overlaps(
    predicted: list[dict[str, Any]], areas: NDArray[np.float64], true: list[dict[str, Any]]
) -> NDArray[np.float64]:
    """Common pixels of each predicted mask, with its area (P,), and each true one (T,), COCO encodings: (P, T)."""
    if not (predicted and true):
        return np.zeros((len(predicted), len(true)))
    # to pycocotools, an IoU with a crowd is the part of the prediction that lies in it
    common: NDArray[np.float64] = np.rint(coco_mask.iou(predicted, true, [1] * len(true)) * areas[:, None])
    return common


@register_metric("instance_f1")
class InstanceF1(SummedMetric):
    """TP / (TP + (FP + FN) / 2) over the instances of all images.

    A predicted instance of IoU > `iou_threshold` with a true one of its class is a true positive; predicted and true
    instances pair off one to one, as many as possible. A predicted instance without partner is no false positive where
    more than half of it lies in crowd regions of its class, and these are no false negatives.

    A measurement holds for each class true positives, false positives and false negatives (3, K).

    Args:
        id2label: names of the classes that count; segments of others are skipped.
        stuff_ids: those that don't count.
        iou_threshold: 0 to 1.

    Raises:
        ValueError: every class is stuff.

    Examples:
        >>> true = Segments([0, 0], torch.tensor([[0, 0, 1, 1]]))
        >>> metric = InstanceF1({0: "cell"})
        >>> metric.update(Segments([0], torch.tensor([[0, 0, -1, -1]])), true)
        >>> {name: round(score, 3) for name, score in metric.compute().items()}
        {'f1': 0.667, 'precision': 1.0, 'recall': 0.5}
    """

    reads = "panoptic"
    tasks = ("instance",)
    measures = 3

    def __init__(self, id2label: Mapping[int, str], stuff_ids: Collection[int] = (), iou_threshold: float = 0.5):
        super().__init__(things(id2label, stuff_ids))
        self.iou_threshold = iou_threshold
        self.label_ids = sorted(self.names)

    def measure(self, found: Segments, true: Segments) -> Tensor:
        """Counts (3, K) of one image.

        Args:
            found: predicted instances.
            true: annotations of the image.

        Raises:
            ValueError: the sizes differ.
        """
        outcomes, true_labels = self.outcomes(found, true), as_array(true.class_labels)[~as_array(true.is_crowd)]
        of_class = [outcomes[as_array(found.class_labels) == label] for label in self.label_ids]
        hits, false_positives = (np.array([(of == wanted).sum() for of in of_class]) for wanted in (1, 0))
        there = np.array([(true_labels == label).sum() for label in self.label_ids])
        counts = np.stack([hits, false_positives, there - hits]).astype(np.float64)
        return torch.from_numpy(counts.reshape(self.shape))

    def outcomes(self, found: Segments, true: Segments) -> NDArray[np.int8]:
        """Of each predicted segment (P,): 1, a true positive; 0, a false positive; -1, neither.

        Raises:
            ValueError: the sizes differ.
        """
        check_sizes(found, true)
        crowd = as_array(true.is_crowd)
        predicted_labels, true_labels = as_array(found.class_labels), as_array(true.class_labels)
        is_thing = np.flatnonzero(np.isin(predicted_labels, self.label_ids))
        predicted_labels = predicted_labels[is_thing]
        predicted = [found.run_lengths[place] for place in is_thing]
        areas = np.array([found.mask_runs[place].area for place in is_thing], dtype=np.float64)
        overlaps = _mask_overlaps(predicted, areas, true.run_lengths)
        true_areas = np.array([mask.area for mask in true.mask_runs], dtype=np.float64)
        outcomes = np.full(len(found), -1, dtype=np.int8)
        for label in {*predicted_labels.tolist()}:
            rows = predicted_labels == label
            segments, crowds = (true_labels == label) & ~crowd, (true_labels == label) & crowd
            common = overlaps[np.ix_(rows, segments)]
            unions = areas[rows][:, None] + true_areas[segments] - common
            candidates = common > self.iou_threshold * unions
            matched, partners = linear_sum_assignment(candidates, maximize=True)
            matched = matched[candidates[matched, partners]]
            spurious = overlaps[np.ix_(rows, crowds)].sum(1) <= areas[rows] / 2
            outcomes[is_thing[rows][spurious]] = 0
            outcomes[is_thing[rows][matched]] = 1
        return outcomes

    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`f1`, `precision` and `recall` of each class."""
        return _f1(sums)

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`f1`, `precision` and `recall` over the instances of all classes."""
        return _f1(sums.sum(-1, keepdim=True), last=0)


def _f1(sums: Tensor, last: int | slice = slice(None)) -> dict[str, Tensor]:
    """NaN where nothing was predicted and nothing was there."""
    hits, false_positives, false_negatives = (part[..., last] for part in sums.unbind(-2))
    predicted, true = hits + false_positives, hits + false_negatives
    return {"f1": 2 * hits / (predicted + true), "precision": hits / predicted, "recall": hits / true}

"""F1 of predicted instances at one IoU threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..models.run_lengths import as_array
from .average_precision import Masks, run_lengths
from .ground_truth import GroundTruth
from .summed import SummedMetric


def mask_overlaps(
    predicted: list[dict[str, Any]], areas: NDArray[np.float64], true: list[dict[str, Any]]
) -> NDArray[np.float64]:
    """Common pixels of each predicted mask, with its area (P,), and each true one (T,), COCO encodings: (P, T)."""
    if not (predicted and true):
        return np.zeros((len(predicted), len(true)))
    # to pycocotools, an IoU with a crowd is the part of the prediction that lies in it
    return np.rint(coco_mask.iou(predicted, true, [1] * len(true)) * areas[:, None])


class InstanceF1(SummedMetric):
    """TP / (TP + (FP + FN) / 2) over the instances of all images.

    A predicted instance of IoU > `threshold` with a true one of its class is a true positive; predicted and true
    instances pair off one to one, as many as possible. A predicted instance without partner is no false positive where
    more than half of it lies in crowd regions of its class, and these are no false negatives.

    A measurement holds for each class true positives, false positives and false negatives (3, K).

    Args:
        id2label: names of the classes that count, such as those of things; instances of others are skipped.
    """

    measures = 3

    def __init__(self, id2label: dict[int, str], threshold: float = 0.5):
        super().__init__(id2label)
        self.threshold = threshold
        self.label_ids = sorted(id2label)

    def measure(self, masks: Masks, labels: Sequence[int] | Tensor, ground_truth: GroundTruth) -> Tensor:
        """Counts (3, K) of one image: predicted masks, (n, H, W) bool or n COCO encodings, and their classes (n,).

        Raises:
            ValueError: the sizes differ.
        """
        predicted_labels, true_labels = as_array(labels), as_array(ground_truth.labels)
        crowd = as_array(ground_truth.crowd)
        predicted = run_lengths(masks, list(range(len(masks))), ground_truth.size)
        areas = np.array([coco_mask.area(mask) for mask in predicted], dtype=np.float64)
        overlaps = mask_overlaps(predicted, areas, ground_truth.run_lengths)
        true_areas = np.array([mask.area for mask in ground_truth.mask_runs], dtype=np.float64)
        counts = np.zeros(self.shape)
        there = {*predicted_labels.tolist(), *true_labels.tolist()}
        for column, label in enumerate(self.label_ids):
            if label not in there:
                continue
            rows = predicted_labels == label
            segments, crowds = (true_labels == label) & ~crowd, (true_labels == label) & crowd
            common = overlaps[np.ix_(rows, segments)]
            unions = areas[rows][:, None] + true_areas[segments] - common
            candidates = common > self.threshold * unions
            found, partners = linear_sum_assignment(candidates, maximize=True)
            found = found[candidates[found, partners]]
            spurious = overlaps[np.ix_(rows, crowds)].sum(1) <= areas[rows] / 2
            spurious[found] = False
            counts[:, column] = len(found), spurious.sum(), segments.sum() - len(found)
        return torch.from_numpy(counts)

    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        return _f1(sums)

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        return _f1(sums.sum(-1, keepdim=True), last=0)


def _f1(sums: Tensor, last: int | slice = slice(None)) -> dict[str, Tensor]:
    """NaN where nothing was predicted and nothing was there."""
    hits, false_positives, false_negatives = (part[..., last] for part in sums.unbind(-2))
    predicted, true = hits + false_positives, hits + false_negatives
    return {"f1": 2 * hits / (predicted + true), "precision": hits / predicted, "recall": hits / true}

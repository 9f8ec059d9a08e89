"""F1 of predicted instances at one IoU threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..runs import as_array
from .ground_truth import GroundTruth
from .summed import SummedMetric


def mask_overlaps(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Common pixels of each predicted mask (P, H, W) with each true mask (T, H, W): (P, T)."""
    if predicted.shape[1:] != true.shape[1:]:
        raise ValueError(f"Predicted masks {predicted.shape} and true masks {true.shape} differ in size.")
    pixels = math.prod(true.shape[1:])  # float32 counts exactly up to 2^24 pixels
    return predicted.reshape(len(predicted), pixels).astype(np.float32) @ true.reshape(len(true), pixels).T.astype(
        np.float32
    )


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

    def measure(
        self, masks: Tensor | NDArray[np.bool_], labels: Sequence[int] | Tensor, ground_truth: GroundTruth
    ) -> Tensor:
        """Counts (3, K) of one image: predicted masks (n, H, W) bool and their classes (n,).

        Raises:
            ValueError: the sizes differ.
        """
        predicted, visible = as_array(masks), ground_truth.visible
        true = as_array(ground_truth.masks_of(visible))
        predicted_labels, true_labels = as_array(labels), as_array(ground_truth.labels)
        crowd = as_array(ground_truth.crowd)
        overlaps, true_areas = np.zeros((len(predicted), len(crowd)), np.float32), np.zeros(len(crowd))
        overlaps[:, visible] = mask_overlaps(predicted, true)
        areas, true_areas[visible] = (m.sum((1, 2), dtype=np.float64) for m in (predicted, true))
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

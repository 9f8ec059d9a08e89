"""Panoptic quality."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.run_lengths import as_array, count, overlay
from ..models.segments import VOID, Segments
from .metric import SummedMetric, check_contiguous, register_metric


@register_metric("panoptic_quality")
class PanopticQuality(SummedMetric):
    """PQ, SQ and RQ (Kirillov, He, Girshick, Rother, Dollar, CVPR 2019), with the rules of panopticapi.

    - A predicted and a true segment of one class match where their IoU is above 0.5; void pixels of the predicted
      segment don't count in the union.
    - A predicted segment without match is a false positive, unless more than half of it is void or in the crowd region
      of its class (of several crowd regions of one class, as in panopticapi, in the last).
    - A true segment without match is a false negative; crowd regions match nothing and are no false negatives.

    A measurement holds for each class the sum of the IoUs of its matches, true positives, false positives and false
    negatives (4, K). Classes that neither the predictions nor the targets hold are NaN and don't count in the means.

    Args:
        id2label: names of the K classes, ids 0..K-1.
        stuff_ids: classes of stuff; the others are things.

    Raises:
        ValueError: the classes are not 0..K-1, or one of stuff is not among them.

    Examples:
        >>> true = Segments([0, 1], torch.tensor([[0, 0, 0, 1]]))
        >>> metric = PanopticQuality({0: "road", 1: "car"}, stuff_ids=[0])
        >>> metric.update(Segments([0], torch.tensor([[0, 0, 0, 0]])), true)
        >>> scores = metric.compute()
        >>> scores["pq_stuff"], scores["pq_things"]
        (0.75, 0.0)
    """

    reads = "panoptic"
    tasks = ("panoptic",)
    measures = 4

    def __init__(self, id2label: Mapping[int, str], stuff_ids: Collection[int] = ()):
        super().__init__(id2label)
        check_contiguous(id2label)
        num_labels = len(id2label)
        if unknown := sorted(set(stuff_ids) - set(id2label)):
            raise ValueError(f"stuff_ids {unknown} are not among the {num_labels} classes.")
        self.is_stuff = torch.zeros(num_labels, dtype=torch.bool, device="cpu")
        self.is_stuff[sorted(stuff_ids)] = True

    def measure(self, found: Segments, true: Segments) -> Tensor:
        """(4, K) of one image.

        Args:
            found: predicted segments, without overlap.
            true: annotations of the image.

        Raises:
            ValueError: the sizes differ, segments overlap, a predicted one has no pixel, or a class is unknown.
        """
        return torch.from_numpy(_matches(*self._compared(found, true), num_labels=len(self.names)))

    def outcomes(self, found: Segments, true: Segments) -> NDArray[np.int8]:
        """Of each predicted segment (P,): 1, a true positive; 0, a false positive; -1, neither.

        Raises:
            ValueError: as `measure`.
        """
        rows, _, _, false_positive, _ = _matched(*self._compared(found, true))
        outcomes = np.where(false_positive, 0, -1).astype(np.int8)
        outcomes[rows] = 1
        return outcomes

    def _compared(
        self, found: Segments, true: Segments
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Arguments of `_matched`."""
        if found.size != true.size:
            raise ValueError(
                f"{true.name}: the prediction is {found.size}, the annotation {true.size} (height, width)."
            )
        predicted_labels, true_labels = as_array(found.class_labels), as_array(true.class_labels)
        self._check_labels(predicted_labels, true_labels, true.name)
        rows, columns = len(found) + 2, len(true) + 2  # NO_SEGMENT and VOID are the last two
        of_rows, of_columns, pixels = overlay(
            found.runs._replace(values=found.runs.values.astype(np.int64) % rows * columns),
            true.runs._replace(values=true.runs.values.astype(np.int64) % columns),
        )
        overlaps = count(of_rows + of_columns, pixels, rows * columns).reshape(rows, columns)
        empty = np.flatnonzero(overlaps[:-2].sum(1) == 0)
        if len(empty):
            ids = range(len(found)) if found.ids is None else found.ids
            missing = [ids[row] for row in empty[:5].tolist()]
            raise ValueError(f"{true.name}: segments_info has ids {missing} that the map lacks.")
        return overlaps, predicted_labels, true_labels, as_array(true.is_crowd)

    def _check_labels(self, predicted: NDArray[Any], true: NDArray[Any], name: str) -> None:
        for kind, labels in (("predicted", predicted), ("true", true)):
            wrong = (labels < 0) | (labels >= len(self.names))
            if wrong.any():
                found = np.unique(labels[wrong]).tolist()
                raise ValueError(f"{name}: {kind} segments have classes {found} outside 0..{len(self.names) - 1}.")

    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`pq`, `sq` and `rq` of each class."""
        ious, hits, false_positives, false_negatives = sums.unbind(-2)
        segments = hits + (false_positives + false_negatives) / 2
        sq = torch.where((hits == 0) & (segments > 0), 0.0, ious / hits)
        return {"pq": ious / segments, "sq": sq, "rq": hits / segments}

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`pq`, `sq` and `rq`, means over all classes, and with `_things` and `_stuff` over those."""
        groups = {"": torch.ones_like(self.is_stuff), "_things": ~self.is_stuff, "_stuff": self.is_stuff}
        of_classes = self.class_scores(sums)
        return {
            score + group: values[..., members].nanmean(-1)
            for group, members in groups.items()
            for score, values in of_classes.items()
        }


def _matches(
    overlaps: NDArray[np.float64],
    predicted_labels: NDArray[np.int64],
    true_labels: NDArray[np.int64],
    crowd: NDArray[np.bool_],
    num_labels: int,
) -> NDArray[np.float64]:
    """Sum of IoUs, true positives, false positives, false negatives of each class (4, K): see `_matched`."""
    rows, columns, ious, false_positive, false_negative = _matched(overlaps, predicted_labels, true_labels, crowd)
    result = np.empty((4, num_labels))
    result[0] = np.bincount(true_labels[columns], ious, num_labels)
    result[1] = np.bincount(true_labels[columns], minlength=num_labels)
    result[2] = np.bincount(predicted_labels[false_positive], minlength=num_labels)
    result[3] = np.bincount(true_labels[false_negative], minlength=num_labels)
    return result


def _matched(
    overlaps: NDArray[np.float64],
    predicted_labels: NDArray[np.int64],
    true_labels: NDArray[np.int64],
    crowd: NDArray[np.bool_],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Places of segments that match, with their IoUs (T,) each, and which are false positives (P,) and negatives (M,).

    Args:
        overlaps: pixels of each predicted segment (rows) in each true one (columns); the last two: in none, void.
        predicted_labels: (P,)
        true_labels: (M,)
        crowd: (M,)
    """
    predicted_areas = overlaps[:-2].sum(1)  # (P,)
    true_areas = overlaps[:, :-2].sum(0)  # (M,)
    common, in_void = overlaps[:-2, :-2], overlaps[:-2, VOID]
    unions = (predicted_areas - in_void)[:, None] + true_areas - common
    comparable = (predicted_labels[:, None] == true_labels) & ~crowd
    rows, columns = np.nonzero(comparable & (2 * common > unions))  # IoU > 0.5

    ignored = in_void.copy()
    crowd_of_class = {int(true_labels[place]): place for place in np.flatnonzero(crowd)}  # the last of a class stays
    for row, label in enumerate(predicted_labels.tolist() if crowd_of_class else []):
        if label in crowd_of_class:
            ignored[row] += common[row, crowd_of_class[label]]
    false_positive = 2 * ignored <= predicted_areas
    false_positive[rows] = False
    false_negative = ~crowd
    false_negative[columns] = False
    return rows, columns, common[rows, columns] / unions[rows, columns], false_positive, false_negative

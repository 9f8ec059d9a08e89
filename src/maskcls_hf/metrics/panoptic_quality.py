"""Panoptic quality."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.sample import VOID
from ..models.run_lengths import Runs, as_array, count, overlay, places_in
from .ground_truth import GroundTruth
from .summed import SummedMetric, check_contiguous


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
    """

    measures = 4

    def __init__(self, id2label: dict[int, str], stuff_ids: Collection[int] = ()):
        super().__init__(id2label)
        check_contiguous(id2label)
        num_labels = len(id2label)
        if unknown := sorted(set(stuff_ids) - set(id2label)):
            raise ValueError(f"stuff_ids {unknown} are not among the {num_labels} classes.")
        self.is_stuff = torch.zeros(num_labels, dtype=torch.bool, device="cpu")
        self.is_stuff[sorted(stuff_ids)] = True

    def measure(
        self, segmentation: Tensor | NDArray, segments_info: Sequence[Mapping[str, Any]], ground_truth: GroundTruth
    ) -> Tensor:
        """(4, K) of one image.

        Args:
            segmentation: ids of predicted segments (H, W); ids below 1 that `segments_info` lacks are no segment.
            segments_info: `id` and `label_id` of each predicted segment, as `post_process_panoptic_segmentation` gives.
            ground_truth: annotations of the image.

        Raises:
            ValueError: the sizes differ, segments of the truth overlap, the map and `segments_info` name different
                segments, or a class is unknown.
        """
        name = ground_truth.name
        predicted = as_array(segmentation)
        if predicted.shape != ground_truth.size:
            raise ValueError(
                f"{name}: the prediction is {predicted.shape}, the annotation {ground_truth.size} (height, width)."
            )
        ids = [int(info["id"]) for info in segments_info]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{name}: segments_info names an id twice: {sorted(ids)}.")
        predicted_labels = np.array([info["label_id"] for info in segments_info], dtype=np.int64)
        true_labels = as_array(ground_truth.labels)
        self._check_labels(predicted_labels, true_labels, name)
        found, true = Runs.of(predicted), ground_truth.runs
        if true is None:
            true = Runs.of(as_array(ground_truth.places))
        if true.values.size and not -2 <= true.values.min() <= true.values.max() < len(true_labels):
            raise ValueError(f"{name}: the annotation holds places outside its {len(true_labels)} segments.")
        rows = places_in(found.values, ids)
        unknown = found.values[(rows == len(ids)) & ~(found.values <= 0)]  # NaN too
        if unknown.size:
            some = np.unique(unknown)[:5].tolist()
            raise ValueError(f"{name}: the predicted map holds ids {some} that segments_info lacks.")
        columns = len(true_labels) + 2  # segments, NO_SEGMENT, VOID: places -2 and -1 are the last two columns
        of_rows, of_columns, pixels = overlay(
            found._replace(values=rows * columns), true._replace(values=true.values.astype(np.int64) % columns)
        )
        overlaps = count(of_rows + of_columns, pixels, (len(ids) + 1) * columns).reshape(-1, columns)
        areas = overlaps.sum(1)  # (P + 1,)
        if not areas[:-1].all():
            missing = [i for i, area in zip(ids, areas, strict=False) if area == 0]
            raise ValueError(f"{name}: segments_info has ids {missing[:5]} that the map lacks.")
        crowd = as_array(ground_truth.crowd)
        return torch.from_numpy(_matches(overlaps, predicted_labels, true_labels, crowd, len(self.names)))

    def _check_labels(self, predicted: NDArray, true: NDArray, name: str) -> None:
        for kind, labels in (("predicted", predicted), ("true", true)):
            wrong = (labels < 0) | (labels >= len(self.names))
            if wrong.any():
                found = np.unique(labels[wrong]).tolist()
                raise ValueError(f"{name}: {kind} segments have classes {found} outside 0..{len(self.names) - 1}.")

    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        ious, hits, false_positives, false_negatives = sums.unbind(-2)
        segments = hits + (false_positives + false_negatives) / 2
        sq = torch.where((hits == 0) & (segments > 0), 0.0, ious / hits)
        return {"pq": ious / segments, "sq": sq, "rq": hits / segments}

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
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
    """Sum of IoUs, true positives, false positives, false negatives of each class (4, K).

    Args:
        overlaps: pixels of each predicted segment (rows; the last: of none) in each true one (columns; the last two: in
            none, void).
    """
    predicted_areas = overlaps[:-1].sum(1)  # (P,)
    true_areas = overlaps[:, :-2].sum(0)  # (M,)
    common, in_void = overlaps[:-1, :-2], overlaps[:-1, VOID]
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
    result = np.empty((4, num_labels))
    result[0] = np.bincount(true_labels[columns], common[rows, columns] / unions[rows, columns], num_labels)
    result[1] = np.bincount(true_labels[columns], minlength=num_labels)
    result[2] = np.bincount(predicted_labels[false_positive], minlength=num_labels)
    result[3] = np.bincount(true_labels[false_negative], minlength=num_labels)
    return result

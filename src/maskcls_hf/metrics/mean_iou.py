"""Mean intersection over union of semantic maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.run_lengths import Ids, count, overlay
from ..models.segments import Segments, void_id_of
from .metric import SummedMetric, check_contiguous, register_metric

ClassMap = Segments | Tensor | NDArray[Any]


class SemanticCounts(SummedMetric):
    """Scores made of pixel counts: of each class those predicted right, the true and the predicted ones (3, K).

    Args:
        id2label: names of the K classes, ids 0..K-1.
        stuff_ids: not looked at; all metrics take it.
        void_id: marks unlabeled pixels in maps; where a prediction has it, a pixel is predicted as no class. None:
            255, or 65535 with more than 255 classes.

    Raises:
        ValueError: the classes are not 0..K-1, or `void_id` is one of them.
    """

    reads = "semantic"
    measures = 3

    def __init__(self, id2label: Mapping[int, str], stuff_ids: Collection[int] = (), void_id: int | None = None):
        super().__init__(id2label)
        check_contiguous(id2label)
        num_labels = len(id2label)
        self.void_id = void_id_of(num_labels) if void_id is None else void_id
        if 0 <= self.void_id < num_labels:
            raise ValueError(f"void_id={self.void_id} is one of the {num_labels} classes: choose another number.")

    def class_map(self, given: ClassMap, name: str) -> Segments:
        """Segments as they are; a map of class ids (H, W) as segments, which messages call `name`."""
        return given if isinstance(given, Segments) else Segments.from_class_map(given, self.void_id, name)

    def counts(self, predicted: Ids, true: Ids, pixels: NDArray[np.int64]) -> Tensor:
        """Pixels of each class; ids outside the classes are of no class.

        Args:
            predicted: class ids of runs (R,).
            true: class ids of the same runs (R,).
            pixels: their lengths (R,).

        Returns:
            (3, K) float64: predicted right, true, predicted.
        """
        number = len(self.names)
        predicted, true = (np.where((ids >= 0) & (ids < number), ids, number) for ids in (predicted, true))
        right = np.where(predicted == true, true, number)
        return torch.from_numpy(np.stack([count(ids, pixels, number + 1)[:-1] for ids in (right, true, predicted)]))

    @staticmethod
    def iou(sums: Tensor) -> Tensor:
        """(..., 3, K) -> (..., K), NaN where a class is neither predicted nor there."""
        right, true, predicted = sums.unbind(-2)
        return right / (true + predicted - right)


@register_metric("mean_iou")
class MeanIoU(SemanticCounts):
    """Mean and frequency-weighted IoU, pixel accuracy and mean accuracy (Long, Shelhamer, Darrell, CVPR 2015).

    Void pixels don't count. Classes that neither the predictions nor the targets hold have IoU NaN and don't count in
    the mean. Arguments: see [`SemanticCounts`].

    Examples:
        >>> metric = MeanIoU({0: "road", 1: "sky"})
        >>> metric.update(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 1, 255]]))
        >>> {name: round(score, 3) for name, score in metric.compute().items()}["mean_iou"]
        0.333
    """

    tasks = ("semantic",)

    def measure(self, found: ClassMap, true: ClassMap) -> Tensor:
        """Counts (3, K) of one image.

        Args:
            found: predicted segments, or class ids (H, W).
            true: annotated segments, or class ids (H, W).

        Raises:
            ValueError: the sizes differ, or an id lies outside the classes.
        """
        check_sizes(found, true)
        maps = (self.class_map(found, "Prediction"), self.class_map(true, "Target"))
        predicted, target, pixels = overlay(*(one.semantic_runs(self.void_id) for one in maps))
        valid = target != self.void_id
        predicted, target, pixels = predicted[valid], target[valid], pixels[valid]
        check_ids(predicted, "Prediction", len(self.names), self.void_id)
        check_ids(target, "Target", len(self.names))
        return self.counts(predicted, target, pixels)

    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`iou` and `accuracy` of each class."""
        right, true, _ = sums.unbind(-2)
        return {"iou": self.iou(sums), "accuracy": right / true}

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """`mean_iou`, `frequency_weighted_iou`, `pixel_accuracy` and `mean_accuracy`."""
        right, true, _ = sums.unbind(-2)
        iou, total = self.iou(sums), true.sum(-1)
        return {
            "mean_iou": iou.nanmean(-1),
            "frequency_weighted_iou": (true * iou.nan_to_num(0.0)).sum(-1) / total,
            "pixel_accuracy": right.sum(-1) / total,
            "mean_accuracy": (right / true).nanmean(-1),
        }

    def compute(self) -> dict[str, float]:
        """`mean_iou`, `frequency_weighted_iou`, `pixel_accuracy`, `mean_accuracy`, and `iou_CLASS` of each class."""
        return super().compute() | {f"iou_{name}": scores["iou"] for name, scores in self.per_class().items()}


def check_sizes(found: ClassMap, true: ClassMap) -> None:
    """Refuses maps that are not (H, W), or not of one size.

    Raises:
        ValueError: names both sizes.
    """
    sizes = [tuple(one.size if isinstance(one, Segments) else one.shape) for one in (found, true)]
    if sizes[0] != sizes[1] or len(sizes[0]) != 2:
        raise ValueError(f"Prediction {sizes[0]} and target {sizes[1]} must be maps of one size.")


def check_ids(ids: Ids, name: str, num_labels: int, void_id: int | None = None) -> None:
    """Refuses ids that are no class.

    Args:
        ids: any shape.
        name: of the map, for the message.
        num_labels: K; classes are 0..K-1.
        void_id: passes, too; None: there is none.

    Raises:
        ValueError: names the first ones.
    """
    wrong = (ids < 0) | (ids >= num_labels)
    if void_id is not None:
        wrong &= ids != void_id
    if wrong.any():
        found = np.unique(ids[wrong])[:10].tolist()
        raise ValueError(f"{name} holds class ids {found} outside 0..{num_labels - 1}.")

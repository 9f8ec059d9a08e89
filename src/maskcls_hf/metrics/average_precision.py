"""Mask average precision as COCO defines it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..models.options import require_range
from ..models.run_lengths import as_array
from ..models.segments import Segments
from .metric import check_sizes, class_names, register_metric, things

Numbers = NDArray[np.float64]
_PADDING = -100.0  # what transformers' Trainer pads with
DETECTION, TRUTH = 0.0, 1.0
KIND, CLASS, SCORE, MATCHED, IGNORED = range(5)  # columns of a measurement


def pad_rows(measurements: Sequence[Tensor]) -> Tensor:
    """Measurements of a batch, each (D, F) -> (B, largest D, F), padded with `_PADDING`."""
    if not measurements:
        return torch.zeros(0, 0, 5, dtype=torch.float64, device="cpu")
    return torch.nn.utils.rnn.pad_sequence(list(measurements), batch_first=True, padding_value=_PADDING)


@register_metric("mask_ap")
class MaskAP:
    """Mask AP and AR by pycocotools, image by image: of an image only the matches of its instances stay in memory.

    A measurement is (D, 5): a row for each predicted instance that counts and for each true one, with
    kind, class, score, and two bit fields over IoU thresholds and area ranges: matched, ignored. The number of rows
    differs between images; `pad_rows` makes batches.

    Equal to one run of pycocotools' COCOeval over all images in the order in which they are added. Crowd regions are
    its `iscrowd`. Void is not known to COCO: an instance predicted there is a false positive.

    Args:
        id2label: names of the classes that count; instances of others are skipped.
        stuff_ids: those that don't count.
        max_detections: most instances of a class in an image that count (COCO: 100).

    Raises:
        ValueError: every class is stuff, or `max_detections` is below 1.

    Examples:
        >>> mask = torch.zeros(1, 50, 50, dtype=torch.bool)
        >>> mask[0, 10:40, 10:40] = True
        >>> metric = MaskAP({0: "cell"})
        >>> metric.update(Segments([0], mask, scores=torch.tensor([0.9])), Segments([0], mask))
        >>> round(metric.compute()["ap"], 3)
        1.0
    """

    reads = "instance"
    tasks = ("instance",)
    join = staticmethod(pad_rows)

    def __init__(self, id2label: Mapping[int, str], stuff_ids: Collection[int] = (), max_detections: int = 100):
        require_range("max_detections", max_detections, "[1, inf)", integer=True)
        self.names = class_names(things(id2label, stuff_ids))
        self.max_detections = max_detections
        params = COCOeval(iouType="segm").params
        self.thresholds, self.areas = len(params.iouThrs), len(params.areaRng)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._rows: list[Tensor] = []

    def measure(self, found: Segments, true: Segments) -> Tensor:
        """Rows (D, 5) of one image.

        Args:
            found: predicted instances with their scores.
            true: annotations of the image.

        Raises:
            ValueError: the sizes differ, or there are no scores, or one is NaN.
        """
        check_sizes(found, true)
        if found.scores is None:
            raise ValueError(f"{true.name}: average precision ranks instances by their scores, and there are none.")
        scores = as_array(found.scores, np.float64)
        if np.isnan(scores).any():
            raise ValueError(
                f"{true.name}: the scores of instances {np.flatnonzero(np.isnan(scores)).tolist()} are NaN."
            )
        annotations, detections = self._records(true), self._records(found)
        for place, record in annotations.items():
            record["iscrowd"] = int(true.is_crowd[place])
            if true.areas is not None and not true.areas[place].isnan():
                record["area"] = float(true.areas[place])
        for place, record in detections.items():
            record["score"] = float(scores[place])
        return self._rows_of(list(annotations.values()), list(detections.values()))

    def _records(self, segments: Segments) -> dict[int, dict[str, Any]]:
        """COCO annotations of the instances whose classes count, by their places."""
        labels = segments.class_labels.tolist()
        places = [place for place, label in enumerate(labels) if label in self.names]
        return {
            place: {
                "id": place + 1,
                "image_id": 1,
                "category_id": labels[place],
                "segmentation": code,
                "area": float(coco_mask.area(code)),  # of a list of more than 255 it fails
                "bbox": coco_mask.toBbox(code).tolist(),
                "iscrowd": 0,
            }
            for place, code in ((place, segments.run_lengths[place]) for place in places)
        }

    def _rows_of(self, true: list[dict[str, Any]], found: list[dict[str, Any]]) -> Tensor:
        """Evaluate one image with pycocotools."""
        classes = sorted({record["category_id"] for record in true + found})
        if not classes:
            return torch.zeros(0, 5, dtype=torch.float64, device="cpu")
        size = (true or found)[0]["segmentation"]["size"]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(_coco(true, classes, size), _coco(found, classes, size), "segm")
            evaluation.params.maxDets = [self.max_detections]
            evaluation.evaluate()
        results = np.array(evaluation.evalImgs, dtype=object).reshape(len(classes), self.areas)
        blocks = []
        for label, of_areas in zip(classes, results, strict=True):
            scores = np.array(of_areas[0]["dtScores"], dtype=np.float64)
            matched = _pack(np.concatenate([result["dtMatches"] > 0 for result in of_areas]))
            ignored = _pack(np.concatenate([result["dtIgnore"] > 0 for result in of_areas]))
            # of the truth the order differs between areas, and only numbers are needed
            outside = _pack(np.stack([np.sort(result["gtIgnore"]) > 0 for result in of_areas]))
            blocks.append(_block(DETECTION, label, scores, matched, ignored))
            zeros = np.zeros_like(outside)
            blocks.append(_block(TRUTH, label, zeros, zeros, outside))
        return torch.from_numpy(np.concatenate(blocks))

    def add(self, measurements: Tensor) -> None:
        """Adds the measurement of one image (D, 5), or those of several (..., D, 5), padded with `_PADDING`.

        Raises:
            ValueError: the last axis is not 5.
        """
        if measurements.shape[-1] != 5:
            raise ValueError(f"MaskAP takes measurements (..., D, 5), got {tuple(measurements.shape)}.")
        self._rows.append(self.rows(measurements))

    @staticmethod
    def rows(measurements: Tensor) -> Tensor:
        """Measurements (..., D, 5) -> (D', 5) without padding."""
        rows = measurements.detach().cpu().double().reshape(-1, 5)
        return rows[rows[:, KIND] != _PADDING]

    def update(self, found: Segments, true: Segments) -> None:
        """Measure one image and add it; arguments of `measure`."""
        self.add(self.measure(found, true))

    def compute(self) -> dict[str, float]:
        """`ap` (mean over IoU 0.50:0.95), `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, and `ar`.

        The last is the mean recall over IoU 0.50:0.95. NaN without true instances, 0 without predicted ones.
        """
        precision, recall = self.accumulated(self._labels_there())
        return summary(precision, recall)

    def per_class(self) -> dict[str, dict[str, float]]:
        """Scores of each class, by its name."""
        there = self._labels_there()
        precision, recall = self.accumulated(there)
        place = {label: [k] for k, label in enumerate(there)}
        return {
            name: summary(precision[:, :, place.get(label, [])], recall[:, place.get(label, [])])
            for label, name in self.names.items()
        }

    def _labels_there(self) -> list[int]:
        """Classes of which there is an instance, true or predicted: there can be far more classes than these."""
        return sorted({int(label) for rows in self._rows for label in rows[:, CLASS].unique().tolist()})

    def accumulated(self, labels: Sequence[int] | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision and recall by pycocotools; -1 where there is no true instance.

        pycocotools joins the records of all images of a class, so that one joined record is the same to it.

        Args:
            labels: of these classes; None: of all.

        Returns:
            Precision (IoU thresholds, recalls, classes, areas) and recall (IoU thresholds, classes, areas).
        """
        rows = torch.cat([torch.zeros(0, 5, dtype=torch.float64, device="cpu"), *self._rows]).numpy()
        labels = list(self.names) if labels is None else list(labels)
        if not labels:
            return -np.ones((self.thresholds, 1, 0, self.areas)), -np.ones((self.thresholds, 0, self.areas))
        order = np.argsort(rows[:, CLASS], kind="stable")
        ends = np.searchsorted(rows[order, CLASS], labels, side="right")
        of_class = [rows[order[start:end]] for start, end in zip([0, *ends], ends, strict=False)]
        evaluation = COCOeval(iouType="segm")
        params = evaluation.params
        params.imgIds, params.catIds, params.maxDets = [0], labels, [max(len(rows), 1)]
        evaluation.evalImgs = [record for rows_of_class in of_class for record in self._joined(rows_of_class)]
        evaluation._paramsEval = params
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        return evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]

    def _joined(self, rows: NDArray[np.float64]) -> list[dict[str, Any] | None]:
        """Records of one class (D, 5), one for each area range."""
        if not len(rows):
            return [None] * self.areas
        detections, truth = rows[rows[:, KIND] == DETECTION], rows[rows[:, KIND] == TRUTH]
        matched = self.unpack(detections[:, MATCHED])
        ignored = self.unpack(detections[:, IGNORED])
        outside = _unpack(truth[:, IGNORED], self.areas)
        return [
            {
                "dtScores": detections[:, SCORE],
                "dtMatches": matched[area],
                "dtIgnore": ignored[area],
                "gtIgnore": outside[area],
            }
            for area in range(self.areas)
        ]

    def weighted_scores(
        self, rows: Numbers, weights: NDArray[np.int64], image_of_row: NDArray[np.int64]
    ) -> dict[str, Numbers]:
        """Scores of `compute` in R replicates, (R,) each, of images that count several times or not at all.

        Args:
            rows: measurements of all images (D, 5).
            weights: how often each image occurs in each replicate (images, R).
            image_of_row: (D,), the place of its image in `weights`.
        """
        labels = np.unique(rows[:, CLASS])  # no score is of the others
        shape = (self.thresholds, len(labels), self.areas, weights.shape[1])
        precision, recall = -np.ones(shape), -np.ones(shape)
        for k, label in enumerate(labels):
            of_class = rows[:, CLASS] == label
            truth = rows[of_class & (rows[:, KIND] != DETECTION)]
            detections = of_class & (rows[:, KIND] == DETECTION)
            order = np.flatnonzero(detections)[np.argsort(-rows[detections, SCORE], kind="stable")]
            matched, ignored = self.unpack(rows[order, MATCHED]), self.unpack(rows[order, IGNORED])
            weights_of_truth = weights[image_of_row[of_class & (rows[:, KIND] != DETECTION)]]
            weights_of_order = weights[image_of_row[order]]
            for area in range(self.areas):
                inside = (truth[:, IGNORED].astype(np.int64) >> area & 1) == 0
                total = weights_of_truth[inside].sum(0)  # (R,)
                there = total > 0
                for threshold in range(self.thresholds):
                    valid = ~ignored[area, threshold]
                    values = _precision_and_recall(
                        matched[area, threshold][valid], weights_of_order[valid], np.maximum(total, 1)
                    )
                    for table, value in zip((precision, recall), values, strict=True):
                        table[threshold, k, area, there] = value[there]
        of_replicates = [summary(precision[..., r], recall[..., r]) for r in range(weights.shape[1])]
        return {name: np.array([scores[name] for scores in of_replicates]) for name in of_replicates[0]}

    def unpack(self, fields: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Bit fields (D,) -> (area ranges, IoU thresholds, D)."""
        return _unpack(fields, self.areas * self.thresholds).reshape(self.areas, self.thresholds, -1)


def _coco(annotations: list[dict[str, Any]], classes: list[int], size: list[int]) -> COCO:
    """One image in pycocotools' form."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "height": size[0], "width": size[1]}],
        "categories": [{"id": label} for label in classes],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _pack(bits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n, D) -> (D,): numbers below 2^n, which float64 holds exactly up to n = 53."""
    return np.asarray((2.0 ** np.arange(len(bits))) @ bits, dtype=np.float64)


def _unpack(fields: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    return (fields.astype(np.int64) >> np.arange(n)[:, None] & 1).astype(bool)


def _block(kind: float, label: int, *columns: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack([np.full(len(columns[0]), kind), np.full(len(columns[0]), float(label)), *columns])


def summary(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """Scores by name, as pycocotools summarizes them: means over all but -1, NaN where all are.

    Args:
        precision: (IoU thresholds 0.50, 0.55, ..., any, areas all, small, medium, large).
        recall: (IoU thresholds, classes, areas).
    """

    def mean(values: NDArray[np.float64]) -> float:
        values = values[values > -1]
        return float(np.mean(values)) if values.size else float("nan")

    return {
        "ap": mean(precision[..., 0]),
        "ap50": mean(precision[0, ..., 0]),
        "ap75": mean(precision[5, ..., 0]),
        "ap_small": mean(precision[..., 1]),
        "ap_medium": mean(precision[..., 2]),
        "ap_large": mean(precision[..., 3]),
        "ar": mean(recall[..., 0]),
    }


def _precision_and_recall(
    matched: NDArray[np.bool_], weights: NDArray[np.int64], total: NDArray[np.int64]
) -> tuple[Numbers, Numbers]:
    """Mean precision over COCO's 101 recalls (R,), and recall (R,), of detections in the order of their scores.

    Args:
        matched: (D,)
        weights: (D, R)
        total: number of true instances (R,).
    """
    hits = np.cumsum(weights[matched], axis=0)  # (J, R), at each hit
    if not len(hits):
        return np.zeros(len(total)), np.zeros(len(total))
    found = np.cumsum(weights, axis=0)[matched]
    precision = hits / (found + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    recalls = COCOeval(iouType="segm").params.recThrs
    reached = np.searchsorted(recalls, hits / total, side="right")  # recalls at or below that of each hit
    steps = np.diff(reached, axis=0, prepend=0)
    return (envelope * steps).sum(0) / len(recalls), hits[-1] / total

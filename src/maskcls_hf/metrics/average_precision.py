"""Mask average precision as COCO defines it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..models.run_lengths import as_array
from .ground_truth import GroundTruth
from .summed import class_names

Masks = Tensor | NDArray[np.bool_] | Sequence[dict[str, Any]]

PADDING = -100.0  # what transformers' Trainer pads with
DETECTION, TRUTH = 0.0, 1.0
KIND, CLASS, SCORE, MATCHED, IGNORED = range(5)  # columns of a measurement


def pad_rows(measurements: Sequence[Tensor]) -> Tensor:
    """Measurements of a batch, each (D, F) -> (B, largest D, F), padded with `PADDING`."""
    return torch.nn.utils.rnn.pad_sequence(list(measurements), batch_first=True, padding_value=PADDING)


def real_rows(measurements: Tensor) -> Tensor:
    """(..., D, 5) -> (D', 5) without padding."""
    rows = measurements.detach().cpu().double().reshape(-1, 5)
    return rows[rows[:, KIND] != PADDING]


class MaskAP:
    """Mask AP and AR by pycocotools, image by image: of an image only the matches of its instances stay in memory.

    A measurement is (D, 5): a row for each predicted instance that counts and for each true one, with
    kind, class, score, and two bit fields over IoU thresholds and area ranges: matched, ignored. The number of rows
    differs between images; `pad_rows` makes batches.

    Equal to one run of pycocotools' COCOeval over all images in the order in which they are added. Crowd regions are
    its `iscrowd`. Void is not known to COCO: an instance predicted there is a false positive.

    Args:
        id2label: names of the classes that count, such as those of things; instances of others are skipped.
        max_detections: most instances of a class in an image that count (COCO: 100).
    """

    def __init__(self, id2label: dict[int, str], max_detections: int = 100):
        self.names = class_names(id2label)
        self.max_detections = max_detections
        params = COCOeval(iouType="segm").params
        self.thresholds, self.areas = len(params.iouThrs), len(params.areaRng)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._rows: list[Tensor] = []

    def measure(
        self,
        masks: Masks,
        labels: Sequence[int] | Tensor,
        scores: Sequence[float] | Tensor,
        ground_truth: GroundTruth,
    ) -> Tensor:
        """Rows (D, 5) of one image.

        Args:
            masks: of predicted instances (n, H, W) bool, or n COCO run-length encodings.
            labels: their classes (n,).
            scores: their scores (n,).
            ground_truth: annotations of the image.

        Raises:
            ValueError: the sizes or the numbers differ, or a score is NaN.
        """
        of_labels, of_scores = as_array(labels, np.int64), as_array(scores, np.float64)
        if not len(masks) == len(of_labels) == len(of_scores):
            raise ValueError(f"{len(masks)} masks, {len(labels)} labels and {len(scores)} scores must be equally many.")
        if np.isnan(of_scores).any():
            wrong = np.flatnonzero(np.isnan(of_scores)).tolist()
            raise ValueError(f"{ground_truth.name}: the scores of instances {wrong} are NaN.")
        true = self._records(ground_truth.run_lengths, as_array(ground_truth.labels), ground_truth.size)
        found = self._records(masks, of_labels, ground_truth.size)
        for place, record in true.items():
            record["iscrowd"] = int(ground_truth.crowd[place])
            if ground_truth.areas is not None and not ground_truth.areas[place].isnan():
                record["area"] = float(ground_truth.areas[place])
        for place, record in found.items():
            record["score"] = float(of_scores[place])
        return self._rows_of(list(true.values()), list(found.values()))

    def _records(self, masks: Masks, labels: NDArray, size: tuple[int, int]) -> dict[int, dict[str, Any]]:
        """COCO annotations of the instances whose classes count, by their places."""
        places = [place for place, label in enumerate(labels.tolist()) if label in self.names]
        return {
            place: {
                "id": place + 1,
                "image_id": 1,
                "category_id": int(labels[place]),
                "segmentation": code,
                "area": float(coco_mask.area(code)),
                "bbox": coco_mask.toBbox(code).tolist(),
                "iscrowd": 0,
            }
            for place, code in zip(places, run_lengths(masks, places, size), strict=True)
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
        """Add the measurement of one image (D, 5), or those of several (..., D, 5), padded with `PADDING`."""
        if measurements.shape[-1] != 5:
            raise ValueError(f"MaskAP takes measurements (..., D, 5), got {tuple(measurements.shape)}.")
        self._rows.append(real_rows(measurements))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Measure one image and add it; arguments of `measure`."""
        self.add(self.measure(*args, **kwargs))

    def compute(self) -> dict[str, float]:
        """`ap` (mean over IoU 0.50:0.95), `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, and `ar`, the mean
        recall over IoU 0.50:0.95. NaN without true instances, 0 without predicted ones."""
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
        """Precision (IoU thresholds, recalls, classes, areas) and recall (IoU thresholds, classes, areas) by
        pycocotools; -1 where there is no true instance. `labels`: of these classes; None: of all.

        pycocotools joins the records of all images of a class, so that one joined record is the same to it.
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

    def unpack(self, fields: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Bit fields (D,) -> (area ranges, IoU thresholds, D)."""
        return _unpack(fields, self.areas * self.thresholds).reshape(self.areas, self.thresholds, -1)


def run_lengths(masks: Masks, places: list[int], size: tuple[int, int]) -> list[dict[str, Any]]:
    """COCO encodings of the masks at some places. ValueError: they are of another size."""
    if isinstance(masks, Sequence):
        codes = [masks[place] for place in places]
    else:
        codes = [coco_mask.encode(np.asfortranarray(as_array(masks[place]).astype(np.uint8))) for place in places]
    for code in codes:
        if tuple(code["size"]) != size:
            raise ValueError(
                f"Mask and image differ in size: a mask of size {tuple(code['size'])} is scored on an image of size "
                f"{size}."
            )
    return codes


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
    """Scores by name, as pycocotools summarises them: means over all but -1, NaN where all are.

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

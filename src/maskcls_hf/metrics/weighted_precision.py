"""Mask AP of images that count several times or not at all, for the bootstrap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from .average_precision import CLASS, DETECTION, IGNORED, KIND, MATCHED, SCORE, MaskAP, summary

Numbers = NDArray[np.float64]


def weighted_scores(
    metric: MaskAP, rows: Numbers, weights: NDArray[np.int64], image_of_row: NDArray[np.int64]
) -> dict[str, Numbers]:
    """Scores of `MaskAP.compute` in R replicates, (R,) each.

    Args:
        rows: measurements of all images (D, 5).
        weights: how often each image occurs in each replicate (images, R).
        image_of_row: (D,)
    """
    labels = np.unique(rows[:, CLASS])  # no score is of the others
    shape = (metric.thresholds, len(labels), metric.areas, weights.shape[1])
    precision, recall = -np.ones(shape), -np.ones(shape)
    for k, label in enumerate(labels):
        of_class = rows[:, CLASS] == label
        truth = rows[of_class & (rows[:, KIND] != DETECTION)]
        detections = of_class & (rows[:, KIND] == DETECTION)
        order = np.flatnonzero(detections)[np.argsort(-rows[detections, SCORE], kind="stable")]
        matched, ignored = metric.unpack(rows[order, MATCHED]), metric.unpack(rows[order, IGNORED])
        weights_of_truth = weights[image_of_row[of_class & (rows[:, KIND] != DETECTION)]]
        weights_of_order = weights[image_of_row[order]]
        for area in range(metric.areas):
            inside = (truth[:, IGNORED].astype(np.int64) >> area & 1) == 0
            total = weights_of_truth[inside].sum(0)  # (R,)
            there = total > 0
            for threshold in range(metric.thresholds):
                counted = ~ignored[area, threshold]
                values = _precision_and_recall(
                    matched[area, threshold][counted], weights_of_order[counted], np.maximum(total, 1)
                )
                for table, value in zip((precision, recall), values, strict=True):
                    table[threshold, k, area, there] = value[there]
    of_replicates = [summary(precision[..., r], recall[..., r]) for r in range(weights.shape[1])]
    return {name: np.array([scores[name] for scores in of_replicates]) for name in of_replicates[0]}


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

"""Scores of predicted instances: F1 at one IoU threshold, and mask AP as COCO defines it."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment


def mask_ious(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> NDArray[np.float64]:
    """IoU of each predicted mask (P, H, W) with each true mask (T, H, W): (P, T)."""
    if predicted.shape[1:] != true.shape[1:]:
        raise ValueError(f"Predicted masks {predicted.shape} and true masks {true.shape} differ in size.")
    pixels = math.prod(true.shape[1:])
    predicted = predicted.reshape(len(predicted), pixels).astype(np.float32)
    true = true.reshape(len(true), pixels).astype(np.float32)
    overlap = predicted @ true.T
    union = predicted.sum(1)[:, None] + true.sum(1)[None] - overlap
    return overlap / np.maximum(union, 1)


class InstanceF1:
    """TP / (TP + (FP + FN) / 2) over all images.

    A predicted instance of IoU > `threshold` with a true one is a true positive; predicted and true instances pair
    off one to one, as many as possible.

    Memory stays constant.
    """

    def __init__(self, threshold: float = 0.5):
        self.threshold = threshold
        self.true_positives = self.false_positives = self.false_negatives = 0

    def update(self, predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> None:
        """Add one image: predicted masks (P, H, W), true masks (T, H, W)."""
        candidates = mask_ious(predicted, true) > self.threshold
        rows, columns = linear_sum_assignment(candidates, maximize=True)
        hits = int(candidates[rows, columns].sum())
        self.true_positives += hits
        self.false_positives += len(predicted) - hits
        self.false_negatives += len(true) - hits

    def compute(self) -> dict[str, float]:
        """`f1`, `precision`, `recall`; NaN where nothing was predicted and nothing was there."""
        hits = self.true_positives
        predicted, true = hits + self.false_positives, hits + self.false_negatives
        return {
            "f1": 2 * hits / (predicted + true) if predicted + true else float("nan"),
            "precision": hits / predicted if predicted else float("nan"),
            "recall": hits / true if true else float("nan"),
        }


class MaskAP:
    """Mask average precision by pycocotools. Keeps run lengths, not masks.

    Args:
        id2label: names of the classes of things.
        max_detections: most instances of an image that count (COCO: 100).
    """

    def __init__(self, id2label: dict[int, str], max_detections: int = 100):
        self.max_detections = max_detections
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.results: list[dict] = []
        self.categories = [{"id": label_id, "name": name} for label_id, name in sorted(id2label.items())]

    def update(
        self,
        predicted: NDArray[np.bool_],
        predicted_labels: list[int],
        scores: list[float],
        true: NDArray[np.bool_],
        true_labels: list[int],
    ) -> None:
        """Add one image: masks (P, H, W), classes and scores predicted; true masks (T, H, W) and classes."""
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "height": true.shape[1], "width": true.shape[2]})
        for mask, label in zip(true, true_labels, strict=True):
            record = self._record(image_id, mask, label)
            self.annotations.append(record | {"id": len(self.annotations) + 1, "iscrowd": 0})
        for mask, label, score in zip(predicted, predicted_labels, scores, strict=True):
            self.results.append(self._record(image_id, mask, label) | {"score": float(score)})

    @staticmethod
    def _record(image_id: int, mask: NDArray[np.bool_], label: int) -> dict:
        run_lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {
            "image_id": image_id,
            "category_id": int(label),
            "segmentation": run_lengths,
            "area": float(coco_mask.area(run_lengths)),
            "bbox": coco_mask.toBbox(run_lengths).tolist(),
        }

    def compute(self) -> dict[str, float]:
        """`ap` (mean over IoU 0.50:0.95), `ap50`, `ap75`; NaN without true instances, 0 without predicted ones."""
        names = ("ap", "ap50", "ap75")
        if not self.annotations:
            return dict.fromkeys(names, float("nan"))
        if not self.results:
            return dict.fromkeys(names, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {
                "info": {},
                "images": self.images,
                "annotations": self.annotations,
                "categories": self.categories,
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(self.results), "segm")
            evaluation.params.maxDets = [1, 10, self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, classes)
        precision = np.where(precision < 0, np.nan, precision)  # classes without true instances
        thresholds = evaluation.params.iouThrs
        return {
            "ap": float(np.nanmean(precision)),
            "ap50": float(np.nanmean(precision[np.isclose(thresholds, 0.5)])),
            "ap75": float(np.nanmean(precision[np.isclose(thresholds, 0.75)])),
        }

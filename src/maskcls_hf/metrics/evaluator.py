"""Scores during training: counts of each batch, added up as `compute_metrics` of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .mean_iou import MeanIoU, confusion_matrix, semantic_target


class SemanticEvaluator:
    """Mean IoU in constant memory, for `TrainingArguments(batch_eval_metrics=True)`.

    Predictions are compared at the size of the network input, which is that of the labels.

    Args:
        image_processor: makes semantic maps from the outputs of the model.
        id2label: names of the K classes.
    """

    def __init__(self, image_processor: Any, id2label: dict[int, str], void_id: int = 255):
        self.image_processor = image_processor
        self.void_id = void_id
        self.mean_iou = MeanIoU(id2label, void_id)

    def batch_counts(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """Confusion matrix of each image (B, K, K): of one size, so that processes can gather them."""
        valid_sizes = outputs.valid_sizes.tolist()
        maps = self.image_processor.post_process_semantic_segmentation(outputs, target_sizes=valid_sizes)
        num_labels = len(self.mean_iou.id2label)
        counts = []
        for index, (prediction, (height, width)) in enumerate(zip(maps, valid_sizes, strict=True)):
            target = self._target(batch, index)[:height, :width]
            counts.append(confusion_matrix(prediction, target, num_labels, self.void_id))
        return torch.stack(counts)

    def _target(self, batch: Mapping[str, Any], index: int) -> Tensor:
        if "labels" in batch:
            return batch["labels"][index]
        void_mask = batch.get("void_mask")
        return semantic_target(
            batch["mask_labels"][index],
            batch["class_labels"][index],
            None if void_mask is None else void_mask[index],
            self.void_id,
        )

    def __call__(self, evaluation: Any, compute_result: bool) -> dict[str, float]:
        """`compute_metrics`: add the counts of a batch; the scores, and a fresh start, after the last one."""
        self.mean_iou.add(torch.as_tensor(evaluation.predictions))
        if not compute_result:
            return {}
        scores = self.mean_iou.compute()
        self.mean_iou.reset()
        return scores

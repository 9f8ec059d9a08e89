"""Scores of predicted segmentations, gathered batch by batch."""

from .evaluator import SemanticEvaluator
from .instances import InstanceF1, MaskAP
from .mean_iou import MeanIoU, confusion_matrix, semantic_target

__all__ = ["InstanceF1", "MaskAP", "MeanIoU", "SemanticEvaluator", "confusion_matrix", "semantic_target"]

"""Scores of predicted segmentations, gathered image by image."""

from .average_precision import MaskAP, pad_rows
from .bootstrap import Bootstrap
from .boundary import BoundaryIoU
from .evaluator import Evaluator
from .ground_truth import NO_SEGMENT, GroundTruth
from .instances import InstanceF1
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality
from .table import per_class_markdown, per_class_table

__all__ = [
    "NO_SEGMENT",
    "Bootstrap",
    "BoundaryIoU",
    "Evaluator",
    "GroundTruth",
    "InstanceF1",
    "MaskAP",
    "MeanIoU",
    "PanopticQuality",
    "pad_rows",
    "per_class_markdown",
    "per_class_table",
]

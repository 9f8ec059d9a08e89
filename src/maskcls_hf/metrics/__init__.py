"""Scores of predicted segmentations, gathered image by image."""

from ..models.segments import NO_SEGMENT, VOID, Segments
from .average_precision import MaskAP, pad_rows
from .bootstrap import Bootstrap
from .boundary import BoundaryIoU
from .evaluator import Evaluator
from .instances import InstanceF1
from .mean_iou import MeanIoU
from .metric import register_metric
from .panoptic_quality import PanopticQuality
from .table import per_class_markdown, per_class_table

__all__ = [
    "NO_SEGMENT",
    "VOID",
    "Bootstrap",
    "BoundaryIoU",
    "Evaluator",
    "InstanceF1",
    "MaskAP",
    "MeanIoU",
    "PanopticQuality",
    "Segments",
    "pad_rows",
    "per_class_markdown",
    "per_class_table",
    "register_metric",
]

"""Data sets, augmentation and collation for training."""

from .augmented import AugmentedDataset, EpochSampler, repeats_by_area
from .checks import refuse
from .collate import MaskClsCollator
from .dataset import SegmentationDataset
from .layouts import (
    Ade20k,
    Cityscapes,
    CocoInstances,
    CocoPanoptic,
    SegmentationFolder,
    SegmentationStream,
    SegmentationTable,
    open_dataset,
    register_layout,
)
from .sample import VOID, Sample, Segments
from .transforms import CenterCrop, TrainTransform

__all__ = [
    "VOID",
    "Ade20k",
    "AugmentedDataset",
    "CenterCrop",
    "Cityscapes",
    "CocoInstances",
    "CocoPanoptic",
    "EpochSampler",
    "MaskClsCollator",
    "Sample",
    "SegmentationDataset",
    "SegmentationFolder",
    "SegmentationStream",
    "SegmentationTable",
    "Segments",
    "TrainTransform",
    "open_dataset",
    "refuse",
    "register_layout",
    "repeats_by_area",
]

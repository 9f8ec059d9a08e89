"""Data sets, augmentation and collation for training."""

from .augmented import AugmentedDataset, EpochSampler, repeats_by_area
from .cityscapes import Cityscapes
from .coco_instances import CocoInstances
from .coco_panoptic import CocoPanoptic
from .collate import MaskClsCollator
from .dataset import SegmentationDataset
from .folder_dataset import Ade20k, SegmentationFolder
from .open_dataset import open_dataset
from .sample import VOID, Sample
from .table import SegmentationStream, SegmentationTable
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
    "TrainTransform",
    "open_dataset",
    "repeats_by_area",
]

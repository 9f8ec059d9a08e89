"""Data sets, augmentation and collation for training."""

from .collate import MaskClsCollator
from .folder_dataset import Sample, SegmentationFolder
from .transforms import CentreCrop, ScaleJitterCrop, train_transform

__all__ = ["CentreCrop", "MaskClsCollator", "Sample", "ScaleJitterCrop", "SegmentationFolder", "train_transform"]

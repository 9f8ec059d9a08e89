"""Mask-classification segmentation (MaskFormer, NeurIPS 2021) for the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers.
"""

from .configuration_maskcls import MaskClsConfig
from .configuration_perpixel import PerPixelConfig
from .criterion import MaskClsCriterion
from .hub import register
from .image_processing_maskcls import MaskClsImageProcessor
from .modeling_maskcls import MaskClsForUniversalSegmentation, MaskClsModel
from .modeling_perpixel import PerPixelForSemanticSegmentation

register()

__all__ = [
    "MaskClsConfig",
    "MaskClsCriterion",
    "MaskClsForUniversalSegmentation",
    "MaskClsImageProcessor",
    "MaskClsModel",
    "PerPixelConfig",
    "PerPixelForSemanticSegmentation",
]

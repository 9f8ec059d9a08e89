"""Mask-classification segmentation (MaskFormer, NeurIPS 2021) for the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers.
"""

from .hub import register
from .models.configuration_maskcls import MaskClsConfig, PerPixelConfig
from .models.criterion import MaskClsCriterion
from .models.image_processing_maskcls import MaskClsImageProcessor
from .models.modeling_maskcls import MaskClsForUniversalSegmentation, MaskClsModel, PerPixelForSemanticSegmentation

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

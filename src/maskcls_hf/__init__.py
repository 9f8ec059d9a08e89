"""Mask-classification segmentation (MaskFormer, NeurIPS 2021) for the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers.
"""

from .hub import register
from .models.configuration_maskcls import MaskClsConfig
from .models.configuration_perpixel import PerPixelConfig
from .models.image_processing_maskcls import MaskClsImageProcessor
from .models.losses import MaskClsCriterion
from .models.modeling_maskcls import MaskClsForUniversalSegmentation, MaskClsModel
from .models.modeling_perpixel import PerPixelForSemanticSegmentation

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

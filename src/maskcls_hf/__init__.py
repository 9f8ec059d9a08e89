"""Mask-classification segmentation (MaskFormer, NeurIPS 2021) for the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers.
"""

from .hub import register
from .models.configuration_maskcls import (
    LOSSES,
    MATCHERS,
    PIXEL_DECODERS,
    TRANSFORMER_DECODERS,
    MaskClsConfig,
    PerPixelConfig,
)
from .models.criterion import MaskClsCriterion
from .models.image_processing_maskcls import MaskClsImageProcessor
from .models.modeling_maskcls import MaskClsForUniversalSegmentation, MaskClsModel, PerPixelForSemanticSegmentation

register()

register_pixel_decoder = PIXEL_DECODERS.register
register_transformer_decoder = TRANSFORMER_DECODERS.register
register_matcher = MATCHERS.register
register_loss = LOSSES.register

__all__ = [
    "MaskClsConfig",
    "MaskClsCriterion",
    "MaskClsForUniversalSegmentation",
    "MaskClsImageProcessor",
    "MaskClsModel",
    "PerPixelConfig",
    "PerPixelForSemanticSegmentation",
    "register_loss",
    "register_matcher",
    "register_pixel_decoder",
    "register_transformer_decoder",
]

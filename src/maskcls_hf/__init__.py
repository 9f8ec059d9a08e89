"""Mask-classification segmentation (MaskFormer, NeurIPS 2021) for the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers.
"""

from typing import Any

from .hub import register
from .models.configuration_maskcls import MaskClsConfig, PerPixelConfig
from .models.criterion import MaskClsCriterion
from .models.image_processing_maskcls import MaskClsImageProcessor
from .models.modeling_maskcls import MaskClsForUniversalSegmentation, MaskClsModel, PerPixelForSemanticSegmentation

register()


def __getattr__(name: str) -> Any:
    if name == "register_metric":  # without pycocotools and scipy until they are needed
        from .metrics import register_metric

        return register_metric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MaskClsConfig",
    "MaskClsCriterion",
    "MaskClsForUniversalSegmentation",
    "MaskClsImageProcessor",
    "MaskClsModel",
    "PerPixelConfig",
    "PerPixelForSemanticSegmentation",
    "register_metric",
]

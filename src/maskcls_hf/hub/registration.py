"""Registration with transformers; the configurations say which Auto class stands for which model."""

from importlib import import_module

import transformers
from transformers import AutoConfig, AutoImageProcessor, ImageSegmentationPipeline
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)

from ..models.configuration_maskcls import MaskClsConfig, PerPixelConfig
from ..models.image_processing_maskcls import MaskClsImageProcessor


def register() -> None:
    """Make `AutoConfig`, `AutoImageProcessor`, `AutoModel...` and pipelines know the classes; again does no harm."""
    for config_class in (MaskClsConfig, PerPixelConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoImageProcessor.register(
            config_class, image_processor_classes={"torchvision": MaskClsImageProcessor}, exist_ok=True
        )
        for auto_class, reference in config_class.auto_classes.items():
            module, name = reference.split(".")
            model_class = getattr(import_module(f"maskcls_hf.models.{module}"), name)
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
    smooth_pipeline()


def smooth_pipeline() -> None:
    """Two corners of transformers 5.23 that `pipeline("image-segmentation")` would trip over."""
    # It logs an error about model classes whose names are not in these tables.
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES["maskcls"] = "MaskClsForUniversalSegmentation"
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["maskcls_perpixel"] = "PerPixelForSemanticSegmentation"
    # It looks for a video processor too, takes the image processor's code for one, and asks whether to trust it.
    ImageSegmentationPipeline._load_video_processor = False  # type: ignore[assignment]

"""Registration with transformers; the configurations say which Auto class stands for which model."""

from importlib import import_module

import transformers
from transformers import AutoConfig, AutoImageProcessor, ImageSegmentationPipeline
from transformers.models.auto import modeling_auto
from transformers.pipelines import PIPELINE_REGISTRY

from ..convert import register_readers
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.kinds import KINDS


def register() -> None:
    """Make `AutoConfig`, `AutoImageProcessor`, `AutoModel...` and pipelines know the classes, and our classes the
    checkpoints of others; again does no harm.
    """
    for config_class, model_class, _ in KINDS.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoImageProcessor.register(
            config_class, image_processor_classes={"torchvision": MaskClsImageProcessor}, exist_ok=True
        )
        for auto_class, reference in config_class.auto_classes.items():
            registered = getattr(import_module(model_class.__module__), reference.split(".")[1])
            getattr(transformers, auto_class).register(config_class, registered, exist_ok=True)
    register_readers()
    _patch_pipeline()


def _patch_pipeline() -> None:
    """Our pipeline in the place of transformers', and two corners of transformers 5.23 that it would trip over."""
    # It logs an error about model classes whose names are not in these tables.
    modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES["maskcls"] = "MaskClsForUniversalSegmentation"
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["maskcls_perpixel"] = "PerPixelForSemanticSegmentation"
    # It looks for a video processor too, takes the image processor's code for one, and asks whether to trust it.
    ImageSegmentationPipeline._load_video_processor = False  # type: ignore[assignment]
    task = PIPELINE_REGISTRY.supported_tasks["image-segmentation"]
    if isinstance(task["impl"], str):  # imported when it is needed; classes before transformers 5.2x
        task["impl"] = f"{__package__}.pipeline.SegmentationPipeline"
    else:
        task["impl"] = import_module(".pipeline", __package__).SegmentationPipeline

"""Checkpoints of other implementations -> ours, and back; outputs of other models -> probability-mask pairs."""

from functools import partial

from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    MaskFormerConfig,
)

from ..models.configuration_maskcls import CHECKPOINT_READERS, CONFIG_READERS
from ..models.options import BACKBONE_READERS
from .eomt import config_from_eomt, load_eomt
from .mask2former import config_from_mask2former, load_mask2former
from .maskformer import config_from_maskformer, load_maskformer
from .original import from_original, save_from_original
from .pairs import pairs_from_detections, pairs_from_detr, pairs_from_logits
from .per_pixel import from_per_pixel, processor_from_per_pixel, save_from_per_pixel
from .pretrained_backbones import LoadedWeights, open_backbone
from .to_transformers import processor_to_transformers, save_as_transformers, to_transformers

__all__ = [
    "LoadedWeights",
    "from_original",
    "from_per_pixel",
    "open_backbone",
    "pairs_from_detections",
    "pairs_from_detr",
    "pairs_from_logits",
    "processor_from_per_pixel",
    "processor_to_transformers",
    "save_as_transformers",
    "save_from_original",
    "save_from_per_pixel",
    "to_transformers",
]


def register_readers() -> None:
    """Let `from_pretrained` of our classes read the checkpoints of transformers' MaskFormer, Mask2Former and
    EoMT, and `from_backbone` pretrained backbones; again does no harm.
    """
    CONFIG_READERS[MaskFormerConfig.model_type] = config_from_maskformer
    CHECKPOINT_READERS[MaskFormerConfig.model_type] = load_maskformer
    CONFIG_READERS[Mask2FormerConfig.model_type] = config_from_mask2former
    CHECKPOINT_READERS[Mask2FormerConfig.model_type] = load_mask2former
    for config_class, model_class in (
        (EomtConfig, EomtForUniversalSegmentation),
        (EomtDinov3Config, EomtDinov3ForUniversalSegmentation),
    ):
        CONFIG_READERS[config_class.model_type] = config_from_eomt
        CHECKPOINT_READERS[config_class.model_type] = partial(load_eomt, model_class)
    BACKBONE_READERS[:] = [open_backbone]

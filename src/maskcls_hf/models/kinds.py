"""The kinds of models of this package: the one table of their classes. It does not travel with checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import EomtConfig, EomtDinov3Config, Mask2FormerConfig, MaskFormerConfig

from .configuration_maskcls import MaskClsConfig, PerPixelConfig
from .modeling_maskcls import MaskClsForUniversalSegmentation, PerPixelForSemanticSegmentation


class ModelKind(NamedTuple):
    """A kind of models: its classes.

    Args:
        config_class: says in `auto_classes` which Auto classes stand for its models.
        model_class: with the head.
        model_types: of the saved models that it loads.
    """

    config_class: Any
    model_class: Any
    model_types: tuple[str, ...]

    @property
    def auto_class(self) -> str:
        """Of transformers, for the model with its head."""
        return next(name for name in self.config_class.auto_classes if name != "AutoModel")


# By the name that recipes have for it (`model.kind`).
KINDS = {
    "mask_classification": ModelKind(
        # Those of transformers are converted while they load.
        MaskClsConfig, MaskClsForUniversalSegmentation,
        (
            MaskClsConfig.model_type, MaskFormerConfig.model_type, Mask2FormerConfig.model_type,
            EomtConfig.model_type, EomtDinov3Config.model_type,
        ),
    ),
    "per_pixel": ModelKind(PerPixelConfig, PerPixelForSemanticSegmentation, (PerPixelConfig.model_type,)),
}  # fmt: skip
KIND_OF_TYPE = {model_type: kind for kind in KINDS.values() for model_type in kind.model_types}

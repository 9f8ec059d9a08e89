"""Mask-classification segmentation (MaskFormer, NeurIPS 2021) for the Hugging Face ecosystem.

Importing the package registers its classes with the Auto classes of transformers. The names below come from it; those
that registering does not need are imported when they are first used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import MaskClsCollator as MaskClsCollator
    from .data import open_dataset as open_dataset
    from .data import register_layout as register_layout
    from .hub import register as register
    from .inference import Predictor as Predictor
    from .metrics import Evaluator as Evaluator
    from .metrics import register_metric as register_metric
    from .models.configuration_maskcls import MaskClsConfig as MaskClsConfig
    from .models.configuration_maskcls import PerPixelConfig as PerPixelConfig
    from .models.configuration_maskcls import register_loss as register_loss
    from .models.configuration_maskcls import register_matcher as register_matcher
    from .models.configuration_maskcls import register_pixel_decoder as register_pixel_decoder
    from .models.configuration_maskcls import register_transformer_decoder as register_transformer_decoder
    from .models.image_processing_maskcls import MaskClsImageProcessor as MaskClsImageProcessor
    from .models.losses import MaskClsCriterion as MaskClsCriterion
    from .models.modeling_maskcls import MaskClsForUniversalSegmentation as MaskClsForUniversalSegmentation
    from .models.modeling_maskcls import MaskClsModel as MaskClsModel
    from .models.modeling_maskcls import PerPixelForSemanticSegmentation as PerPixelForSemanticSegmentation
    from .models.segments import Segments as Segments
    from .training import MaskClsTrainer as MaskClsTrainer
    from .training import load_recipe as load_recipe

__version__ = "0.1.0"  # pyproject.toml reads it here

# Module -> its names that are public here; as above, where type checkers read them.
_NAMES = {
    "data": ("MaskClsCollator", "open_dataset", "register_layout"),
    "hub": ("register",),
    "inference": ("Predictor",),
    "metrics": ("Evaluator", "register_metric"),
    "models.configuration_maskcls": (
        "MaskClsConfig",
        "PerPixelConfig",
        "register_loss",
        "register_matcher",
        "register_pixel_decoder",
        "register_transformer_decoder",
    ),
    "models.losses": ("MaskClsCriterion",),
    "models.image_processing_maskcls": ("MaskClsImageProcessor",),
    "models.modeling_maskcls": ("MaskClsForUniversalSegmentation", "MaskClsModel", "PerPixelForSemanticSegmentation"),
    "models.segments": ("Segments",),
    "training": ("MaskClsTrainer", "load_recipe"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command `maskcls` is parsed without transformers, whose import takes seconds; its commands register.
if not getattr(sys.modules.get("maskcls_command"), "parsing", False):
    from .hub import register

    register()

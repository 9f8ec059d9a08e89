"""Trained models on images of any size, and their scores on data sets.

Names are imported when they are first used: registering with transformers needs the loading of models alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.run_lengths import MaskRuns as MaskRuns
    from .evaluation import evaluate as evaluate
    from .predictor import Predictor as Predictor
    from .test_time_augmentation import PAPER_SCALES as PAPER_SCALES
    from .tuning import Tuning as Tuning
    from .tuning import tune as tune

_MODULE_OF = {
    "MaskRuns": "..models.run_lengths", "PAPER_SCALES": ".test_time_augmentation", "Predictor": ".predictor",
    "Tuning": ".tuning", "evaluate": ".evaluation", "tune": ".tuning",
}  # fmt: skip
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULE_OF[name], __name__), name)
    return value

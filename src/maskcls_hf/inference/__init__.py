"""Trained models on images of any size, and their scores on data sets."""

from ..models.run_lengths import MaskRuns
from .evaluation import evaluate
from .predictor import Predictor
from .test_time_augmentation import PAPER_SCALES
from .tuning import Tuning, tune

__all__ = ["PAPER_SCALES", "MaskRuns", "Predictor", "Tuning", "evaluate", "tune"]

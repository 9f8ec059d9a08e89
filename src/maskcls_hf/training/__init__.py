"""Training: recipes, optimiser groups, schedules, averaged weights, and a Trainer."""

from .ema import ExponentialMovingAverage
from .optim import build_optimizer, parameter_groups
from .progress import LossMeans, ShowProgress, TrainingLog, TrainingProgress
from .recipe import Recipe, list_recipes, load_recipe
from .recipe_trainer import TRAINING_ERRORS, train
from .run import Run, prepare
from .schedules import SCHEDULES, build_scheduler, learning_rate_factor
from .stopping import StopSignals, TrainingStopped, stop_signals
from .time_budget import TimeBudget
from .trainer import MaskClsTrainer

__all__ = [
    "SCHEDULES",
    "TRAINING_ERRORS",
    "ExponentialMovingAverage",
    "LossMeans",
    "MaskClsTrainer",
    "Recipe",
    "Run",
    "ShowProgress",
    "StopSignals",
    "TimeBudget",
    "TrainingLog",
    "TrainingProgress",
    "TrainingStopped",
    "build_optimizer",
    "build_scheduler",
    "learning_rate_factor",
    "list_recipes",
    "load_recipe",
    "parameter_groups",
    "prepare",
    "stop_signals",
    "train",
]

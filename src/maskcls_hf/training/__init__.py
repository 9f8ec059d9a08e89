"""Training: recipes, optimiser groups, schedules, averaged weights, and a Trainer."""

from .ema import ExponentialMovingAverage
from .optim import build_optimizer, parameter_groups
from .progress import LossMeans, ShowProgress, TrainingLog, TrainingProgress
from .recipe import Recipe, list_recipes, load_recipe
from .recipe_trainer import TRAINING_ERRORS, train
from .run import Run, prepare
from .schedules import SCHEDULES, build_scheduler, learning_rate_factor
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
    "TimeBudget",
    "TrainingLog",
    "TrainingProgress",
    "build_optimizer",
    "build_scheduler",
    "learning_rate_factor",
    "list_recipes",
    "load_recipe",
    "parameter_groups",
    "prepare",
    "train",
]

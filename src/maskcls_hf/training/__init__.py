"""What training needs beside the model: optimiser groups, a schedule by the clock, and a Trainer."""

from .optim import build_optimizer, parameter_groups
from .time_budget import SCHEDULES, TimeBudget
from .trainer import MaskClsTrainer

__all__ = ["SCHEDULES", "MaskClsTrainer", "TimeBudget", "build_optimizer", "parameter_groups"]

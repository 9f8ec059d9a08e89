"""Training: recipes, optimizers, schedules, averaged weights, a Trainer, and the parts of a loop with Accelerate."""

from .build import build_config, build_image_processor, build_model
from .callbacks import CollapseGuard, ExponentialMovingAverage, MaskAnnealing, TimeBudget, annealing_intervals
from .checkpoints import (
    CheckpointNotFound,
    CorruptCheckpoint,
    checkpoint_to_resume,
    list_checkpoints,
    load_state,
    save_state,
)
from .divergence import DivergenceError, check_finite, check_weights, reraise_as_divergence
from .loop import AccelerateLoop, batches_of_steps, clip_gradients, evaluate, save_training
from .lora import add_lora, merge_adapter
from .optim import SCHEDULES, build_optimizer, build_scheduler, learning_rate_factor, parameter_groups
from .processes import items_of_step
from .progress import LossMeans, ShowProgress, TrainingLog, TrainingProgress
from .recipe import Recipe, list_recipes, load_recipe
from .recipe_training import (
    TRAINING_ERRORS,
    accelerator_options,
    as_script,
    build_trainer,
    prepared_run,
    train,
    training_arguments,
)
from .run import Run, prepare
from .stopping import StopSignals, StopTraining, TrainingStopped, stop_signals
from .trainer import MaskClsTrainer

__all__ = [
    "SCHEDULES",
    "TRAINING_ERRORS",
    "AccelerateLoop",
    "CollapseGuard",
    "CheckpointNotFound",
    "CorruptCheckpoint",
    "DivergenceError",
    "ExponentialMovingAverage",
    "LossMeans",
    "MaskAnnealing",
    "MaskClsTrainer",
    "Recipe",
    "Run",
    "ShowProgress",
    "StopSignals",
    "StopTraining",
    "TimeBudget",
    "TrainingLog",
    "TrainingProgress",
    "TrainingStopped",
    "accelerator_options",
    "add_lora",
    "annealing_intervals",
    "as_script",
    "batches_of_steps",
    "build_config",
    "build_image_processor",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "build_trainer",
    "check_finite",
    "check_weights",
    "checkpoint_to_resume",
    "clip_gradients",
    "evaluate",
    "items_of_step",
    "learning_rate_factor",
    "list_checkpoints",
    "list_recipes",
    "load_recipe",
    "load_state",
    "merge_adapter",
    "parameter_groups",
    "prepare",
    "prepared_run",
    "reraise_as_divergence",
    "save_state",
    "save_training",
    "stop_signals",
    "train",
    "training_arguments",
]

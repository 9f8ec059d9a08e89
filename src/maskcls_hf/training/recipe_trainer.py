"""The training of a recipe with transformers' Trainer, as `maskcls train` and examples/train_trainer.py run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_bf16_available, parse_flag_from_env
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from ..data.errors import told_of_workers
from ..hub.quiet import no_progress_bars
from .checkpoints import NoGoodCheckpoint, list_checkpoints
from .divergence import DivergenceError
from .processes import accelerate_as_before, warn_if_not_sharded
from .progress import ShowProgress
from .recipe import Recipe, load_recipe
from .run import Run, prepare
from .trainer import MaskClsTrainer

logger = logging.get_logger(__name__)

# What the user can mend: scripts say it without a traceback.
TRAINING_ERRORS = (OSError, ValueError, NoGoodCheckpoint, DivergenceError)


@accelerate_as_before()
@no_progress_bars()  # of saving and loading weights; there is a bar of the training
@told_of_workers()
def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    resume: bool = False,
    accumulate: int = 1,
    tensorboard: bool = False,
) -> dict[str, float]:
    """Train, evaluate and save the model, with `MaskClsTrainer`.

    Writes to `out` the model with its image processor, `recipe.yaml`, `eval_results.json`, `trainer_state.json` with
    the log, and checkpoints. The generators of Python, NumPy and torch are seeded with `training.seed`.

    Args:
        data: folder of the data set.
        model: fine-tune the saved model in this folder.
        resume: go on from the last whole checkpoint in `out`.
        accumulate: batches of a step, for less memory; the results are the same.
        tensorboard: write the log to `out`/runs too.

    Returns:
        the scores of the last evaluation, their names beginning with `eval_`.

    Raises:
        OSError, ValueError: as [`prepare`]; `out` holds another training.
        NoGoodCheckpoint: no whole checkpoint to resume from.
        DivergenceError: the loss became NaN or infinite.
    """
    out = Path(out)
    check_precision(recipe)
    check_output(recipe, out, resume, tensorboard)
    processes = PartialState(cpu=on_cpu()).num_processes
    run = prepare(recipe, data, model=model, processes=processes, accumulate=accumulate)
    trainer = RecipeTrainer(run, training_arguments(run, out, tensorboard))
    if trainer.args.world_size != processes:
        raise RuntimeError(f"Accelerate sees {processes} processes, Trainer {trainer.args.world_size}.")
    if trainer.is_world_process_zero():
        warn_if_not_sharded(trainer.accelerator)
        out.mkdir(parents=True, exist_ok=True)
        recipe.save(out / "recipe.yaml")
        print(run.describe(), flush=True)
    trainer.train(resume_from_checkpoint=resume)
    scores = last_evaluation(trainer) or scores_of(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_results(scores, out)
    return scores


class RecipeTrainer(MaskClsTrainer):
    """`MaskClsTrainer` of a [`Run`]."""

    def __init__(self, run: Run, args: TrainingArguments):
        self.run = run
        super().__init__(
            model=run.model,
            args=args,
            train_dataset=run.train_data,
            eval_dataset=run.eval_data,
            sampler=run.sampler,
            data_collator=run.train_collator,
            eval_collator=run.eval_collator,
            evaluator=run.evaluator,
            ema=run.ema,
            processing_class=run.image_processor,
            callbacks=[run.budget, ShowProgress(run.recipe.training.batch_size, run.budget)],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # Methods, as Trainer takes no `optimizers` with FSDP.
    def create_optimizer(self, model: Any = None) -> AdamW:
        self.optimizer = self.run.optimizer
        return self.run.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        self.lr_scheduler = self.run.scheduler
        return self.run.scheduler


def on_cpu() -> bool:
    """Training is on the CPU: there is nothing else, or `accelerate launch --cpu` says so. To be told to Accelerate and
    Trainer, or each process started by torchrun trains alone."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def check_precision(recipe: Recipe) -> None:
    """ValueError where this machine would train in another precision, or fail to."""
    precision = recipe.training.precision
    if on_cpu() and precision == "fp16":
        raise ValueError("training.precision=fp16 needs a GPU; on a CPU: --set training.precision=bf16, or float32.")
    if not on_cpu() and precision == "bf16" and not is_bf16_available():
        raise ValueError("training.precision=bf16: this device has none; --set training.precision=fp16, or float32.")


def training_arguments(run: Run, out: Path, tensorboard: bool = False) -> TrainingArguments:
    settings, every = run.recipe.training, run.recipe.evaluation.every_steps
    return TrainingArguments(
        output_dir=str(out),
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.eval_batch_size,
        gradient_accumulation_steps=run.accumulate,
        max_grad_norm=run.recipe.optimizer.clip_norm or 0.0,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=settings.log_steps,
        eval_strategy="no" if every is None else "steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        use_cpu=on_cpu(),
        report_to="tensorboard" if tensorboard else "none",
    )


def last_evaluation(trainer: MaskClsTrainer) -> dict[str, float] | None:
    """Scores of the evaluation after the last step, if there was one."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return scores_of(entry)
    return None


def scores_of(metrics: dict[str, float]) -> dict[str, float]:
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {name: value for name, value in metrics.items() if name.startswith("eval_") and name not in speed}


def save_results(scores: dict[str, float], out: Path) -> None:
    (out / "eval_results.json").write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")


def check_output(recipe: Recipe, out: Path, resume: bool, tensorboard: bool = False) -> None:
    """
    Raises:
        ValueError: `out` is a file, has checkpoints that nobody asked to resume, or TensorBoard is not installed.
        FileNotFoundError: nothing to resume.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the results need a folder.")
    checkpoints = list_checkpoints(out)
    if checkpoints and not resume:
        raise ValueError(f"{out} holds checkpoints of a training: resume it (--resume), or choose another folder.")
    if resume and not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint in {out} to resume from.")
    if tensorboard and not is_tensorboard_available():
        raise ValueError("TensorBoard is not installed: pip install tensorboard")
    if resume and (out / "recipe.yaml").is_file():
        changed = load_recipe(out / "recipe.yaml").differences(recipe)
        if changed:
            logger.warning(f"The training in {out} goes on with another recipe: {', '.join(changed)} changed.")

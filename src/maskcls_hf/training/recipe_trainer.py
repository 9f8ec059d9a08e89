"""The training of a recipe with transformers' Trainer, as `maskcls train` and examples/train_trainer.py run it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_bf16_available, parse_flag_from_env
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from ..data.errors import told_of_workers
from ..models.checkpoint_manifest import MODEL_FILES
from ..utils.plain_text import printable
from ..utils.quiet import no_progress_bars
from ..utils.writing import write_json
from .checkpoints import NoGoodCheckpoint, list_checkpoints
from .divergence import DivergenceError
from .output import training_in
from .processes import accelerate_as_before, warn_if_not_sharded
from .progress import ShowProgress
from .recipe import Recipe, load_recipe
from .run import Run, prepare
from .stopping import (
    EvaluationStopped,
    StopSignals,
    StopTraining,
    TrainingStopped,
    end,
    shield_workers,
    stop_signals,
)
from .trainer import MaskClsTrainer

logger = logging.get_logger(__name__)

# What the user can mend: scripts say it without a traceback.
TRAINING_ERRORS = (OSError, ValueError, NoGoodCheckpoint, DivergenceError)


@contextmanager
def as_script() -> Iterator[None]:
    """Around the training of a script: it ends with one line, without a traceback, where data, settings or the machine
    do not allow it or a signal has stopped it; weights are saved and loaded without progress bars."""
    try:
        with no_progress_bars(), told_of_workers():
            yield
    except TRAINING_ERRORS as error:
        sys.exit(f"Error: {printable(str(error), keep_lines=True)}")
    except TrainingStopped as stopped:
        end(stopped)


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

    Ctrl-C, SIGTERM and SIGHUP end the step that is under way and leave a checkpoint, after which a resume gives what an
    uninterrupted training gives; a second one ends at once. (In the main thread; elsewhere signals are not handled.)

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
        OSError, ValueError: as [`prepare`]; `out` holds another training, or one is at it.
        CannotWrite: an OSError that names what could not be written, the cause, and the last good checkpoint.
        NoGoodCheckpoint: no whole checkpoint to resume from.
        DivergenceError: the loss became NaN or infinite.
        TrainingStopped: a KeyboardInterrupt, by a signal.
    """
    out = Path(out)
    check_precision(recipe)
    processes = PartialState(cpu=on_cpu()).num_processes
    with stop_signals() as stop, training_in(out):
        check_output(recipe, out, resume, tensorboard)
        run = prepare(recipe, data, model=model, processes=processes, accumulate=accumulate)
        trainer = RecipeTrainer(run, training_arguments(run, out, tensorboard), stop)
        if trainer.args.world_size != processes:
            raise RuntimeError(f"Accelerate sees {processes} processes, Trainer {trainer.args.world_size}.")
        if trainer.is_world_process_zero():
            warn_if_not_sharded(trainer.accelerator)
            recipe.save(out / "recipe.yaml")
            print(printable(run.describe()), flush=True)
        with stop.patient():
            trainer.train(resume_from_checkpoint=resume)
            scores = None if trainer.stops() else last_evaluation(trainer) or trainer.last_scores()
        if scores is None:
            raise stop.stopped()
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            save_results(scores, out)
        return scores


class RecipeTrainer(MaskClsTrainer):
    """`MaskClsTrainer` of a [`Run`], which signals can stop."""

    def __init__(self, run: Run, args: TrainingArguments, stop: StopSignals | None = None):
        self.run = run
        self.stop = stop or StopSignals()
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
            callbacks=[
                run.budget,
                ShowProgress(run.recipe.training.batch_size, run.budget),
                StopTraining(self.stop),
            ],
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

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return shield_workers(super()._get_dataloader(*args, **kwargs))

    def stops(self) -> bool:
        """A signal has come; the same in all processes."""
        return self.stop.agreed(self.args.device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch; before it the evaluation that a signal has kept out of the checkpoint."""
        every, step = self.args.eval_steps, self.state.global_step
        if every and step and step % every == 0 and last_evaluation(self) is None and self.last_scores() is None:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:  # a resume makes it anew
            self.run.evaluator.reset()
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def last_scores(self) -> dict[str, float] | None:
        """Of an evaluation now; None: a signal has stopped it."""
        try:
            return scores_of(self.evaluate())
        except EvaluationStopped:
            return None


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
        if "eval_loss" in entry and entry.get("step") == trainer.state.global_step:
            return scores_of(entry)
    return None


def scores_of(metrics: dict[str, float]) -> dict[str, float]:
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {name: value for name, value in metrics.items() if name.startswith("eval_") and name not in speed}


def save_results(scores: dict[str, float], out: Path) -> None:
    write_json(out / "eval_results.json", scores, indent=2, sort_keys=True)


def check_output(recipe: Recipe, out: Path, resume: bool, tensorboard: bool = False) -> None:
    """
    Raises:
        ValueError: `out` has checkpoints that nobody asked to resume, another model, or a folder in the place of a
            file; or TensorBoard is not
            installed.
        FileNotFoundError: nothing to resume.
    """
    checkpoints = list_checkpoints(out)
    if checkpoints and not resume:
        raise ValueError(f"{out} holds checkpoints of a training: resume it (--resume), or choose another folder.")
    models = sorted(path.name for path in out.glob("*") if MODEL_FILES.fullmatch(path.name))
    if models and not resume:
        raise ValueError(f"{out} holds a model ({', '.join(models)}), which would be replaced: choose another folder.")
    for name in ("recipe.yaml", "trainer_state.json", "eval_results.json", "preprocessor_config.json"):
        if (out / name).is_dir():
            raise ValueError(f"{out / name} is a folder, where the training writes a file: choose another folder.")
    if resume and not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint in {out} to resume from.")
    if tensorboard and not is_tensorboard_available():
        raise ValueError("TensorBoard is not installed: pip install tensorboard")
    if resume and (out / "recipe.yaml").is_file():
        try:
            changed = load_recipe(out / "recipe.yaml").differences(recipe)
        except (OSError, ValueError) as error:  # written by halves, by a version before; it is written anew
            changed = []
            logger.warning(f"What recipe the training in {out} began with is unknown: {error}")
        if changed:
            logger.warning(f"The training in {out} goes on with another recipe: {', '.join(changed)} changed.")

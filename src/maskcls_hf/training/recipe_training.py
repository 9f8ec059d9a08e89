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
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.utils import logging

from ..data.errors import told_of_workers
from ..data.held_out import RECORD, read_record, training_split, write_record
from ..models.checkpoint_manifest import MODEL_FILES
from ..utils.plain_text import printable
from ..utils.quiet import no_progress_bars
from .checkpoints import CheckpointNotFound, CorruptCheckpoint, list_checkpoints
from .divergence import DivergenceError
from .output import save_results, training_in
from .processes import accelerate_as_before, warn_if_not_sharded
from .progress import SPEED, ShowProgress
from .recipe import Recipe, load_recipe
from .run import Run, prepare
from .stopping import StopSignals, StopTraining, TrainingStopped, end, stop_signals
from .trainer import MaskClsTrainer

logger = logging.get_logger(__name__)

# What the user can mend: scripts say it without a traceback.
TRAINING_ERRORS = (OSError, ValueError, CorruptCheckpoint, DivergenceError)


@contextmanager
def as_script() -> Iterator[None]:
    """Around the training of a script: it ends with one line, without a traceback, and an exit code.

    So where data, settings or the machine do not allow it, or a signal has stopped it.
    """
    try:
        yield
    except TRAINING_ERRORS as error:
        sys.exit(f"Error: {printable(str(error), keep_lines=True)}")
    except TrainingStopped as stopped:
        end(stopped)


@accelerate_as_before()
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
    the log, `split.json` where it has held out images for evaluation by itself, and checkpoints. The generators of
    Python, NumPy and torch are seeded with `training.seed`.

    Args:
        recipe: what is trained, and how.
        data: folder of the data set.
        out: folder for the results.
        model: fine-tune the saved model in this folder.
        resume: go on from the last whole checkpoint in `out`.
        accumulate: batches of a step, for less memory; the results are the same.
        tensorboard: write the log to `out`/runs too.

    Returns:
        The scores of the last evaluation, their names beginning with `eval_`.

    Raises:
        OSError: as [`prepare`].
        ValueError: as [`prepare`]; `out` holds another training, or one is at it.
        CannotWrite: an OSError that names what could not be written, the cause, and the last good checkpoint.
        CheckpointNotFound: there is nothing to resume.
        CorruptCheckpoint: what is to be resumed cannot be loaded.
        DivergenceError: the loss became NaN or infinite.
        TrainingStopped: a KeyboardInterrupt, by a signal.
    """
    out = Path(out)
    options: dict[str, Any] = dict(model=model, resume=resume, accumulate=accumulate, tensorboard=tensorboard)
    with prepared_run(recipe, data, out, **options) as (run, stop):
        processes = PartialState().num_processes
        trainer = build_trainer(run, training_arguments(run, out, tensorboard), stop)
        if trainer.args.world_size != processes:
            raise RuntimeError(f"Accelerate sees {processes} processes, Trainer {trainer.args.world_size}.")
        if trainer.is_world_process_zero():
            warn_if_not_sharded(trainer.accelerator)
        with stop.patient():
            trainer.train(resume_from_checkpoint=resume)
            stops = stop.agreed(trainer.args.device)
            scores = {} if stops else _last_evaluation(trainer) or scores_of(trainer.evaluate())
        if not scores:
            raise stop.stopped()
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            save_results(scores, out)
        return scores


@contextmanager
def prepared_run(
    recipe: Recipe,
    data: str | Path,
    out: Path,
    *,
    model: str | Path | None = None,
    resume: bool = False,
    accumulate: int = 1,
    tensorboard: bool = False,
) -> Iterator[tuple[Run, StopSignals]]:
    """The run of a recipe in the folder `out`, which is its own inside, and the signals that come.

    All that the user can mend is checked before: see [`prepare`], [`_check_output`], [`_check_precision`].

    Args:
        recipe: what is trained, and how.
        data: folder of the data set.
        out: folder for the results.
        model: fine-tune the saved model in this folder.
        resume: go on from the last whole checkpoint in `out`.
        accumulate: batches of a step, for less memory; the results are the same.
        tensorboard: write the log to `out`/runs too.
    """
    _check_precision(recipe)
    state = PartialState(cpu=_on_cpu())
    with no_progress_bars(), told_of_workers(), stop_signals() as stop, training_in(out):
        _check_output(recipe, out, resume, tensorboard)
        record = read_record(out) if resume else None
        held_out = None if record is None else record["images"]
        run = prepare(
            recipe, data, model=model, processes=state.num_processes, accumulate=accumulate, held_out=held_out
        )
        if state.is_main_process:
            recipe.save(out / "recipe.yaml")
            _record_held_out(run, Path(data), out)
            print(printable(run.describe()), flush=True)
        yield run, stop


def _record_held_out(run: Run, data: Path, out: Path) -> None:
    """Write which images the training has held out by itself, for a resume and for `maskcls evaluate`."""
    section = run.recipe.data
    if run.held_out is None:
        (out / RECORD).unlink(missing_ok=True)
    else:
        of = training_split(section.train_split, data, section.layout, section.options)
        write_record(out, section.eval_split, of, run.held_out)


def build_trainer(run: Run, args: TrainingArguments, stop: StopSignals | None = None) -> MaskClsTrainer:
    """The Trainer of a run, which signals can stop.

    Args:
        run: what is trained.
        args: such as of [`training_arguments`].
        stop: the signals that have come; None: none come.
    """
    callbacks = [
        run.budget,
        ShowProgress(run.recipe.training.batch_size, run.budget),
        StopTraining(stop or StopSignals()),
    ]
    trainer = MaskClsTrainer(
        model=run.model,
        args=args,
        train_dataset=run.train_data,
        eval_dataset=run.eval_data,
        sampler=run.sampler,
        data_collator=run.train_collator,
        eval_collator=run.eval_collator,
        evaluator=run.evaluator,
        ema=run.ema,
        mask_annealing=run.recipe.training.mask_annealing,
        processing_class=run.image_processor,
        callbacks=callbacks,
    )
    trainer.optimizer, trainer.lr_scheduler = run.optimizer, run.scheduler  # no `optimizers`: not taken with FSDP
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _on_cpu() -> bool:
    """Training is on the CPU: there is nothing else, or `accelerate launch --cpu` says so.

    To be told to Accelerate and Trainer, or each process started by torchrun trains alone.
    """
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _check_precision(recipe: Recipe) -> None:
    """ValueError where this machine would train in another precision, or fail to."""
    precision = recipe.training.precision
    if _on_cpu() and precision == "fp16":
        raise ValueError("training.precision=fp16 needs a GPU; on a CPU: --set training.precision=bf16, or float32.")
    if not _on_cpu() and precision == "bf16" and not is_bf16_available():
        raise ValueError("training.precision=bf16: this device has none; --set training.precision=fp16, or float32.")


def training_arguments(run: Run, out: Path, tensorboard: bool = False) -> TrainingArguments:
    """Arguments of Trainer, as the recipe says.

    Args:
        run: what is trained.
        out: folder for the results.
        tensorboard: write the log to `out`/runs too.
    """
    settings, every = run.recipe.training, run.recipe.evaluation.every_steps
    return TrainingArguments(
        output_dir=str(out),
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.eval_batch_size,
        gradient_accumulation_steps=run.accumulate,
        warmup_steps=run.recipe.schedule.all_warmup_steps,
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
        use_cpu=_on_cpu(),
        report_to="tensorboard" if tensorboard else "none",
    )


def accelerator_options(run: Run, out: Path, tensorboard: bool = False) -> dict[str, Any]:
    """Arguments of `Accelerator` for a loop of one's own, as the recipe says.

    Args:
        run: what is trained.
        out: folder for the results.
        tensorboard: log to TensorBoard, too.
    """
    precision = run.recipe.training.precision
    return {
        "cpu": _on_cpu(),
        "mixed_precision": "no" if precision == "float32" else precision,
        "log_with": "tensorboard" if tensorboard else None,
        "project_dir": out,
    }


def _last_evaluation(trainer: MaskClsTrainer) -> dict[str, float] | None:
    """Scores of the evaluation after the last step, if there was one."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry.get("step") == trainer.state.global_step:
            return scores_of(entry)
    return None


def scores_of(metrics: dict[str, float]) -> dict[str, float]:
    """Of what an evaluation gives the scores, without its speed."""
    return {name: value for name, value in metrics.items() if name.startswith("eval_") and name not in SPEED}


def _check_output(recipe: Recipe, out: Path, resume: bool, tensorboard: bool = False) -> None:
    """Refuses a folder that holds other results, or nothing to resume.

    Raises:
        ValueError: `out` has checkpoints that nobody asked to resume, another model, or a folder in the place of a
            file; or TensorBoard is not installed.
        CheckpointNotFound: nothing to resume.
    """
    checkpoints = list_checkpoints(out)
    if checkpoints and not resume:
        raise ValueError(f"{out} holds checkpoints of a training: resume it (--resume), or choose another folder.")
    models = sorted(path.name for path in out.glob("*") if MODEL_FILES.fullmatch(path.name))
    if models and not resume:
        raise ValueError(f"{out} holds a model ({', '.join(models)}), which would be replaced: choose another folder.")
    for name in ("recipe.yaml", RECORD, "trainer_state.json", "eval_results.json", "preprocessor_config.json"):
        if (out / name).is_dir():
            raise ValueError(f"{out / name} is a folder, where the training writes a file: choose another folder.")
    if resume and not checkpoints:
        raise CheckpointNotFound(f"There is no checkpoint in {out} to resume from.")
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

"""What a training loop of one's own with Accelerate is made of, beside `Run`: see examples/train_accelerate.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from ..utils.writing import saving_model
from .callbacks import CollapseGuard, choose_annealing
from .checkpoints import checkpoint_to_resume, load_state, rng_free, save_state
from .divergence import check_weights, evaluation_after, reraise_as_divergence
from .lora import save_base
from .output import save_results
from .processes import (
    filled_up,
    items_of_step,
    own_class,
    share_buffers,
    warn_if_not_sharded,
    whole_norm,
    without_copies,
)
from .progress import LossMeans, TrainingLog, TrainingProgress
from .run import Run
from .stopping import StopSignals


class AccelerateLoop:
    """All around the steps of a training: log, evaluation, checkpoints and signals, as the recipe says.

    Args:
        run: what is trained.
        accelerator: of the processes, see [`accelerator_options`].
        out: folder for checkpoints, model, log and scores.
        stop: the signals that have come, see [`stop_signals`].
        resume: go on from the last whole checkpoint in `out`.

    Attributes:
        model: prepared by Accelerate.
        optimizer: prepared by Accelerate.
        network: the model without wrappers.
        step: number of steps that are done.

    Raises:
        CheckpointNotFound: there is nothing to resume.
        CorruptCheckpoint: what is to be resumed cannot be loaded.
    """

    def __init__(self, run: Run, accelerator: Accelerator, out: Path, stop: StopSignals, resume: bool = False):
        settings, self.every = run.recipe.training, run.recipe.evaluation.every_steps
        self.run, self.accelerator, self.out, self.stop = run, accelerator, out, stop
        if accelerator.is_main_process:
            warn_if_not_sharded(accelerator)
        self.train_loader, self.eval_loader = (
            rng_free(accelerator.prepare(loader), settings.seed) for loader in run.loaders()
        )
        self.model, self.optimizer = accelerator.prepare(run.model, run.optimizer)
        self.network = accelerator.unwrap_model(self.model)
        self.log, self.means, self.guard = TrainingLog(run.max_steps), LossMeans(), CollapseGuard()
        self.annealing = choose_annealing(self.network, settings.mask_annealing, run.budget.progress)
        accelerator.register_for_checkpointing(run.scheduler, run.budget, self.log, *([run.ema] if run.ema else []))
        self.progress = TrainingProgress(
            run.max_steps, settings.batch_size, run.budget, show=accelerator.is_main_process
        )
        set_seed(settings.seed)
        self.step, self.scores = 0, cast(dict[str, float], {})
        if resume:
            checkpoint = checkpoint_to_resume(out, accelerator)
            load_state(accelerator, checkpoint)
            self.step = stop.step = int(checkpoint.name.removeprefix("checkpoint-"))
        run.budget.start()
        self.anneal()
        self.progress.start(self.step)

    def anneal(self) -> None:
        """Sets the probabilities of an EoMT's masked attention, see [`MaskAnnealing`]; nothing for other models."""
        if self.annealing is not None:
            self.annealing.set(self.step, self.run.max_steps)

    def watch(self, outputs: Any, batch: Mapping[str, Any]) -> None:
        """Of a batch of the training, for a warning of empty masks."""
        self.guard.watch(outputs, batch.get("class_labels"))

    def stopped(self) -> bool:
        """A signal has come; the same in all processes, which all call this."""
        return self.stop.agreed(self.accelerator.device)

    def steps(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of each optimizer step, until the training ends; [`end_step`] is called after each."""
        run, kept_out = self.run, not self.log.has(self.step, "eval_loss")
        if self.every is not None and self.step and self.step % self.every == 0 and kept_out:
            self.evaluate()  # a signal has kept it out
        self.goes_on = not self.stopped()
        batches = batches_of_steps(run, self.train_loader, self.step)
        while self.goes_on and self.step < run.max_steps and not run.budget.spent:
            yield next(batches)

    def end_step(self, losses: Mapping[str, Tensor], grad_norm: Tensor, learning_rate: float) -> None:
        """Log, evaluate and save after a step, where it is time to.

        Args:
            losses: of the step, multiplied by the number of processes, each of which has a share.
            grad_norm: () of the step, before clipping.
            learning_rate: that the step was made with.
        """
        settings, step = self.run.recipe.training, self.step + 1
        self.step = self.stop.step = step
        self.scores = {}
        self.run.budget.tick(self.accelerator.device)
        self.anneal()
        self.progress.advance(step)
        self.means.add(losses)
        rest = {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
        saves = self.stopped() or step == self.run.max_steps or self.run.budget.spent
        saves = saves or step % settings.save_steps == 0
        if saves or step % settings.log_steps == 0:
            self.report({**self.means.pop(self.accelerator), **rest})
            self.guard.check(step, self.run.max_steps, self.run.recipe.schedule.all_warmup_steps)
        if self.every is not None and step % self.every == 0 and not self.stopped():
            self.evaluate()
        if saves or self.stopped():
            if self.means:  # a signal has come since: no mean spans a checkpoint
                self.report({**self.means.pop(self.accelerator), **rest})
            check_weights(self.network, step, self.out)
            save_state(self.accelerator, self.out, step, settings.save_total_limit)
            self.goes_on = not self.stopped()  # asked here alone: what is done has a checkpoint
        self.progress.resume_clock()

    def report(self, values: dict[str, float]) -> None:
        """Writes values to the log, the bar and the trackers of Accelerate; nothing where there are none."""
        if values:
            epoch = self.step * self.run.accumulate / len(self.train_loader)
            self.progress.log(self.log.add(self.step, epoch, values))
            self.accelerator.log(values, step=self.step)

    def evaluate(self) -> None:
        """Evaluates and reports the scores; {} where a signal has stopped it."""
        self.scores = evaluate(self.run, self.model, self.eval_loader, self.accelerator, self.out, self.step, self.stop)
        self.report(self.scores)

    def finish(self) -> dict[str, float]:
        """Scores after the last step; the model is saved.

        Raises:
            TrainingStopped: by a signal.
        """
        if not self.scores:
            self.evaluate()
        self.progress.stop()
        if self.stopped():
            raise self.stop.stopped()
        save_training(self.run, self.model, self.accelerator, self.log, self.scores, self.out)
        return self.scores


def batches_of_steps(run: Run, loader: DataLoader[Any], step: int = 0) -> Iterator[list[dict[str, Any]]]:
    """The batches of each optimizer step, epoch after epoch, without end.

    Args:
        run: says how many batches make a step, and has the sampler.
        loader: of the training, prepared by Accelerate.
        step: number of steps that are done.
    """
    epoch, done = divmod(step * run.accumulate, len(loader))
    while True:
        batches = iter(epoch_batches(loader, run.sampler, epoch, done))
        while step_batches := list(islice(batches, run.accumulate)):
            yield step_batches
        epoch, done = epoch + 1, 0


def epoch_batches(loader: DataLoader[Any], sampler: Sampler[Any], epoch: int, done: int = 0) -> DataLoader[Any]:
    """The prepared loader of one epoch, after its first `done` batches.

    Accelerate does not reach the sampler through the wrappers of a skipped loader in several processes.

    Args:
        loader: prepared by Accelerate.
        sampler: the one inside `loader`; it has `set_epoch`.
        epoch: from 0.
        done: batches of this process.
    """
    loader.set_epoch(epoch)  # type: ignore[attr-defined]
    if done:
        loader = skip_first_batches(loader, done)
    sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return loader


def clip_gradients(accelerator: Accelerator, model: nn.Module, clip_norm: float | None) -> Tensor:
    """Norm () of all gradients, which are scaled to `clip_norm` if it is larger.

    Args:
        accelerator: that has prepared the model.
        model: after the backward pass.
        clip_norm: the largest norm; None or 0: gradients stay.
    """
    norm: Tensor = whole_norm(accelerator.clip_grad_norm_(model.parameters(), clip_norm or float("inf")))
    return norm


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    out: Path,
    step: int,
    stop: StopSignals,
) -> dict[str, float]:
    """Loss and scores of the averaged weights after `step` steps, their names beginning with `eval_`.

    Args:
        run: says what is evaluated.
        model: prepared by Accelerate.
        loader: prepared by Accelerate; its batches have `ground_truth`.
        accelerator: that has prepared them.
        out: the run's folder, for messages.
        step: number of steps that are done, for messages.
        stop: a signal ends the evaluation; the scores are then {}.
    """
    network, losses = accelerator.unwrap_model(model), []
    model.eval()
    with run.averaged(network):
        share_buffers(network)
        for batch in loader:
            if stop.agreed(accelerator.device):
                break
            truth = batch.pop("ground_truth")
            own, weight = without_copies(batch, accelerator)
            items = items_of_step([own], network.config, accelerator, weight)
            with reraise_as_divergence(evaluation_after(step, truth), out):
                outputs = model(**own, num_items_in_batch=items)
            measured = filled_up(run.evaluator.measure(outputs, truth[: len(own["pixel_values"])]), len(truth))
            measured = {name: values.to(accelerator.device) for name, values in measured.items()}
            measured = accelerator.pad_across_processes(measured, dim=1, pad_index=-100)
            run.evaluator.add(accelerator.gather_for_metrics(measured))
            loss = cast(Tensor, accelerator.reduce(outputs.loss * weight, "sum"))  # of the batches of all processes
            losses.append(accelerator.gather_for_metrics(loss.repeat(len(truth))))
    model.train()
    scores = {}
    if not stop.agreed(accelerator.device):
        scores = {"loss": float(torch.cat(losses).mean()), **run.evaluator.compute()}
    run.evaluator.reset()
    return {f"eval_{name}": value for name, value in scores.items()}


def save_training(
    run: Run, model: nn.Module, accelerator: Accelerator, log: TrainingLog, scores: dict[str, float], out: Path
) -> None:
    """Write to `out` the model with its averaged weights, its image processor, the log and the scores.

    All processes call it.

    Args:
        run: what was trained.
        model: prepared by Accelerate.
        accelerator: that has prepared it.
        log: becomes `trainer_state.json`.
        scores: become `eval_results.json`.
        out: the run's folder.

    Raises:
        CannotWrite: names what could not be written, the folder and the cause.
    """
    network = accelerator.unwrap_model(model)
    with run.averaged(network):
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with own_class(network), saving_model(out) as folder:
                network.save_pretrained(folder, state_dict=weights)
                save_base(network, folder)
                run.image_processor.save_pretrained(folder)
    if accelerator.is_main_process:
        log.save(out)
        save_results(scores, out)

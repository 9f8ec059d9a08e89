"""The training loop on one screen, with Accelerate: recipe, numbers and files are those of train_trainer.py.

    python examples/train_accelerate.py --recipe camvid --data camvid --out runs/camvid
    accelerate launch --num_processes 4 examples/train_accelerate.py --recipe ade20k_r50 --data ADEChallengeData2016 ...

With `accelerate launch --use_fsdp --fsdp_version 2` the weights are shared out too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from maskcls_hf.data.errors import told_of_workers
from maskcls_hf.hub.quiet import no_progress_bars
from maskcls_hf.training import (
    TRAINING_ERRORS,
    LossMeans,
    Recipe,
    Run,
    StopSignals,
    TrainingLog,
    TrainingProgress,
    TrainingStopped,
    load_recipe,
    prepare,
    stop_signals,
)
from maskcls_hf.training.checkpoints import checkpoint_to_resume, epoch_batches, load_state, rng_free, save_state
from maskcls_hf.training.divergence import check_finite, check_weights, evaluation_after, forward_pass
from maskcls_hf.training.output import training_in
from maskcls_hf.training.processes import (
    filled_up,
    items_of_step,
    own_class,
    share_buffers,
    warn_if_not_sharded,
    without_copies,
)
from maskcls_hf.training.recipe_trainer import check_output, check_precision, on_cpu, save_results
from maskcls_hf.training.stopping import end
from maskcls_hf.writing import saving_model
from train_trainer import parse_arguments


@told_of_workers()
def training_loop(run: Run, accelerator: Accelerator, out: Path, resume: bool, stop: StopSignals) -> dict[str, float]:
    settings, every = run.recipe.training, run.recipe.evaluation.every_steps
    train_loader, eval_loader = (rng_free(accelerator.prepare(loader), settings.seed) for loader in run.loaders())
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    network = accelerator.unwrap_model(model)
    log, means = TrainingLog(run.max_steps), LossMeans()
    accelerator.register_for_checkpointing(run.scheduler, run.budget, log, *([run.ema] if run.ema else []))
    progress = TrainingProgress(run.max_steps, settings.batch_size, run.budget, show=accelerator.is_main_process)
    set_seed(settings.seed)
    step, scores = 0, {}
    if resume:
        checkpoint = checkpoint_to_resume(out, accelerator)
        load_state(accelerator, checkpoint)
        step = stop.step = int(checkpoint.name.removeprefix("checkpoint-"))
    run.budget.start()
    progress.start(step)
    steps = batches_of_steps(run, train_loader, step)

    def report(values: dict[str, float]) -> None:
        if values:
            progress.log(log.add(step, step * run.accumulate / len(train_loader), values))
            accelerator.log(values, step=step)

    if every is not None and step and step % every == 0 and not log.has(step, "eval_loss"):
        report(scores := evaluate(run, model, eval_loader, accelerator, out, step, stop))  # a signal has kept it out
    while step < run.max_steps and not run.budget.spent and not stop.agreed(accelerator.device):
        batches, losses, scores = next(steps), {}, {}
        items = items_of_step(batches, network.config, accelerator)  # that the loss of the whole step is divided by
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(model):
                with forward_pass(step + 1, out):
                    outputs = model(**batch, num_items_in_batch=items)
                accelerator.backward(outputs.loss * accelerator.num_processes)  # gradients are averaged over processes
            for name, term in {"loss": outputs.loss, **outputs.loss_dict}.items():
                losses[name] = losses.get(name, 0) + term.detach() * accelerator.num_processes
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), run.recipe.optimizer.clip_norm or float("inf"))
        grad_norm = getattr(grad_norm, "full_tensor", lambda norm=grad_norm: norm)()  # FSDP: each process has a share
        check_finite(losses["loss"], losses, step + 1, out, grad_norm if accelerator.scaler is None else None)
        optimizer.step()
        if run.ema:
            run.ema.update(network)
        learning_rate = run.scheduler.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:  # fp16: the gradients overflowed
            run.scheduler.step()
        model.zero_grad()
        step += 1
        stop.step = step
        run.budget.tick(accelerator.device)
        progress.advance(step)
        means.add(losses)

        stops = stop.agreed(accelerator.device)
        saves = stops or step == run.max_steps or run.budget.spent or step % settings.save_steps == 0
        rest = {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
        if saves or step % settings.log_steps == 0:
            report({**means.pop(accelerator), **rest})
        if every is not None and step % every == 0 and not stops:
            report(scores := evaluate(run, model, eval_loader, accelerator, out, step, stop))
        if not saves and stop.agreed(accelerator.device) and step % settings.log_steps:
            report({**means.pop(accelerator), **rest})  # no mean spans a checkpoint
        if saves or stop.agreed(accelerator.device):
            check_weights(network, step, out)
            save_state(accelerator, out, step, settings.save_total_limit)
        progress.resume_clock()

    if not scores:
        report(scores := evaluate(run, model, eval_loader, accelerator, out, step, stop))
    progress.stop()
    if stop.agreed(accelerator.device):
        raise stop.stopped()
    with run.averaged(network):
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with own_class(network), saving_model(out) as folder:
                network.save_pretrained(folder, state_dict=weights)
                run.image_processor.save_pretrained(folder)
    if accelerator.is_main_process:
        log.save(out)
        save_results(scores, out)
    return scores


def batches_of_steps(run: Run, loader: DataLoader, step: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of each optimiser step, epoch after epoch, from step number `step` on."""
    epoch, done = divmod(step * run.accumulate, len(loader))
    while True:
        batches = iter(epoch_batches(loader, run.sampler, epoch, done))
        while step_batches := list(islice(batches, run.accumulate)):
            yield step_batches
        epoch, done = epoch + 1, 0


@torch.no_grad()
def evaluate(
    run: Run, model: Any, loader: DataLoader, accelerator: Accelerator, out: Path, step: int, stop: StopSignals
) -> dict[str, float]:
    """Scores; none if a signal has come in between."""
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
            with forward_pass(evaluation_after(step, truth), out):
                outputs = model(**own, num_items_in_batch=items)
            measured = run.evaluator.measure(outputs, truth[: len(own["pixel_values"])])
            measured = filled_up(measured, len(truth))
            measured = {name: values.to(accelerator.device) for name, values in measured.items()}
            measured = accelerator.pad_across_processes(measured, dim=1, pad_index=-100)
            run.evaluator.add(accelerator.gather_for_metrics(measured))
            loss = accelerator.reduce(outputs.loss * weight, "sum")  # of the batches of all processes
            losses.append(accelerator.gather_for_metrics(loss.repeat(len(truth))))
    model.train()
    scores = (
        {} if stop.agreed(accelerator.device) else {"loss": float(torch.cat(losses).mean()), **run.evaluator.compute()}
    )
    run.evaluator.reset()
    return {f"eval_{name}": value for name, value in scores.items()}


@no_progress_bars()  # of saving and loading weights
def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse_arguments(argv, __doc__)
    try:
        with stop_signals() as stop:
            return train(load_recipe(arguments.recipe, arguments.set), arguments, stop)
    except TRAINING_ERRORS as error:
        sys.exit(f"Error: {error}")
    except TrainingStopped as stopped:
        end(stopped)


def train(recipe: Recipe, arguments: argparse.Namespace, stop: StopSignals) -> dict[str, float]:
    check_precision(recipe)
    precision = {"float32": "no"}.get(recipe.training.precision, recipe.training.precision)
    log_with = "tensorboard" if arguments.tensorboard else None
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=precision, log_with=log_with, project_dir=arguments.out)
    with training_in(arguments.out):
        check_output(recipe, arguments.out, arguments.resume, arguments.tensorboard)
        run = prepare(
            recipe,
            arguments.data,
            model=arguments.model,
            processes=accelerator.num_processes,
            accumulate=arguments.accumulate,
        )
        if accelerator.is_main_process:
            warn_if_not_sharded(accelerator)
            recipe.save(arguments.out / "recipe.yaml")
        accelerator.init_trackers("runs")
        accelerator.print(run.describe())
        with stop.patient():
            scores = training_loop(run, accelerator, arguments.out, arguments.resume, stop)
        accelerator.end_training()
        return scores


if __name__ == "__main__":
    main()

"""The training loop on one screen, with Accelerate: recipe, numbers and files are those of train_trainer.py.

    python examples/train_accelerate.py --recipe camvid --data camvid --out runs/camvid
    accelerate launch --num_processes 4 examples/train_accelerate.py --recipe ade20k_r50 --data ADEChallengeData2016 ...

With `accelerate launch --use_fsdp --fsdp_version 2` the weights are shared out too.
"""

from __future__ import annotations

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
from maskcls_hf.training import TRAINING_ERRORS, LossMeans, Run, TrainingLog, TrainingProgress, load_recipe, prepare
from maskcls_hf.training.checkpoints import checkpoint_to_resume, epoch_batches, load_state, rng_free, save_state
from maskcls_hf.training.divergence import check_finite, check_weights, evaluation_after, forward_pass
from maskcls_hf.training.processes import (
    filled_up,
    items_of_step,
    own_class,
    share_buffers,
    warn_if_not_sharded,
    without_copies,
)
from maskcls_hf.training.recipe_trainer import check_output, check_precision, on_cpu, save_results
from train_trainer import parse_arguments


@told_of_workers()
def training_loop(run: Run, accelerator: Accelerator, out: Path, resume: bool) -> dict[str, float]:
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
        step = int(checkpoint.name.removeprefix("checkpoint-"))
    run.budget.start()
    progress.start(step)
    steps = batches_of_steps(run, train_loader, step)

    def report(values: dict[str, float]) -> None:
        progress.log(log.add(step, step * run.accumulate / len(train_loader), values))
        accelerator.log(values, step=step)

    while step < run.max_steps and not run.budget.spent:
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
        run.budget.tick(accelerator.device)
        progress.advance(step)
        means.add(losses)

        saves = step == run.max_steps or run.budget.spent or step % settings.save_steps == 0
        if saves or step % settings.log_steps == 0:
            report({**means.pop(accelerator), "grad_norm": float(grad_norm), "learning_rate": learning_rate})
        if every is not None and step % every == 0:
            report(scores := evaluate(run, model, eval_loader, accelerator, out, step))
        if saves:
            check_weights(network, step, out)
            save_state(accelerator, out, step, settings.save_total_limit)
        progress.resume_clock()

    if not scores:
        report(scores := evaluate(run, model, eval_loader, accelerator, out, step))
    progress.stop()
    with run.averaged(network):
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with own_class(network):
                network.save_pretrained(out, state_dict=weights)
    if accelerator.is_main_process:
        run.image_processor.save_pretrained(out)
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
    run: Run, model: Any, loader: DataLoader, accelerator: Accelerator, out: Path, step: int
) -> dict[str, float]:
    network, losses = accelerator.unwrap_model(model), []
    model.eval()
    with run.averaged(network):
        share_buffers(network)
        for batch in loader:
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
    scores = {"loss": float(torch.cat(losses).mean()), **run.evaluator.compute()}
    run.evaluator.reset()
    return {f"eval_{name}": value for name, value in scores.items()}


@no_progress_bars()  # of saving and loading weights
def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse_arguments(argv, __doc__)
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        check_precision(recipe)
        check_output(recipe, arguments.out, arguments.resume, arguments.tensorboard)
        precision = {"float32": "no"}.get(recipe.training.precision, recipe.training.precision)
        log_with = "tensorboard" if arguments.tensorboard else None
        accelerator = Accelerator(cpu=on_cpu(), mixed_precision=precision, log_with=log_with, project_dir=arguments.out)
        run = prepare(
            recipe,
            arguments.data,
            model=arguments.model,
            processes=accelerator.num_processes,
            accumulate=arguments.accumulate,
        )
        if accelerator.is_main_process:
            warn_if_not_sharded(accelerator)
            arguments.out.mkdir(parents=True, exist_ok=True)
            recipe.save(arguments.out / "recipe.yaml")
        accelerator.init_trackers("runs")
        accelerator.print(run.describe())
        scores = training_loop(run, accelerator, arguments.out, arguments.resume)
        accelerator.end_training()
        return scores
    except TRAINING_ERRORS as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()

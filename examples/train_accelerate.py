"""The training loop on one screen, with Accelerate: recipe, numbers and files are those of train_trainer.py.

    python examples/train_accelerate.py --recipe camvid --data camvid --out runs/camvid
    accelerate launch --num_processes 4 examples/train_accelerate.py --recipe ade20k_r50 --data ADEChallengeData2016 ...

With `accelerate launch --use_fsdp --fsdp_version 2` the weights are shared out too.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from maskcls_hf.training import (
    LossMeans,
    Run,
    StopSignals,
    TrainingLog,
    TrainingProgress,
    load_recipe,
    prepare,
    stop_signals,
)
from maskcls_hf.training.checkpoints import checkpoint_to_resume, load_state, rng_free, save_state
from maskcls_hf.training.divergence import check_finite, check_weights, forward_pass
from maskcls_hf.training.loop import batches_of_steps, clip_gradients, evaluate, save_training
from maskcls_hf.training.output import training_in
from maskcls_hf.training.processes import items_of_step, warn_if_not_sharded
from maskcls_hf.training.recipe_trainer import as_script, check_output, check_precision, on_cpu
from train_trainer import parse_arguments


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
    goes_on = not stop.agreed(accelerator.device)
    while goes_on and step < run.max_steps and not run.budget.spent:
        batches, losses, scores = next(steps), {}, {}
        items = items_of_step(batches, network.config, accelerator)  # that the loss of the whole step is divided by
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(model):
                with forward_pass(step + 1, out):
                    outputs = model(**batch, num_items_in_batch=items)
                accelerator.backward(outputs.loss * accelerator.num_processes)  # gradients are averaged over processes
            for name, term in {"loss": outputs.loss, **outputs.loss_dict}.items():
                losses[name] = losses.get(name, 0) + term.detach() * accelerator.num_processes
        grad_norm = clip_gradients(accelerator, model, run.recipe.optimizer.clip_norm)
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

        rest = {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
        saves = stop.agreed(accelerator.device) or step == run.max_steps or run.budget.spent
        saves = saves or step % settings.save_steps == 0
        if saves or step % settings.log_steps == 0:
            report({**means.pop(accelerator), **rest})
        if every is not None and step % every == 0 and not stop.agreed(accelerator.device):
            report(scores := evaluate(run, model, eval_loader, accelerator, out, step, stop))
        if saves or stop.agreed(accelerator.device):
            if means:  # a signal has come since: no mean spans a checkpoint
                report({**means.pop(accelerator), **rest})
            check_weights(network, step, out)
            save_state(accelerator, out, step, settings.save_total_limit)
            goes_on = not stop.agreed(accelerator.device)  # asked here alone: what is done has a checkpoint
        progress.resume_clock()

    if not scores:
        report(scores := evaluate(run, model, eval_loader, accelerator, out, step, stop))
    progress.stop()
    if stop.agreed(accelerator.device):
        raise stop.stopped()
    save_training(run, model, accelerator, log, scores, out)
    return scores


@as_script()
def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse_arguments(argv, __doc__)
    recipe, out = load_recipe(arguments.recipe, arguments.set), arguments.out
    check_precision(recipe)
    precision = {"float32": "no"}.get(recipe.training.precision, recipe.training.precision)
    log_with = "tensorboard" if arguments.tensorboard else None
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=precision, log_with=log_with, project_dir=out)
    with stop_signals() as stop, training_in(out):
        check_output(recipe, out, arguments.resume, arguments.tensorboard)
        run = prepare(
            recipe,
            arguments.data,
            model=arguments.model,
            processes=accelerator.num_processes,
            accumulate=arguments.accumulate,
        )
        if accelerator.is_main_process:
            warn_if_not_sharded(accelerator)
            recipe.save(out / "recipe.yaml")
        accelerator.init_trackers("runs")
        accelerator.print(run.describe())
        with stop.patient():
            scores = training_loop(run, accelerator, out, arguments.resume, stop)
        accelerator.end_training()
        return scores


if __name__ == "__main__":
    main()

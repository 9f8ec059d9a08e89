"""The training loop with Accelerate: recipe, numbers and files are those of train_trainer.py.

    python examples/train_accelerate.py --recipe camvid --data camvid --out runs/camvid
    accelerate launch --num_processes 4 examples/train_accelerate.py --recipe ade20k_r50 --data ADEChallengeData2016 ...

With `accelerate launch --use_fsdp --fsdp_version 2` the weights are shared out too.
"""

from __future__ import annotations

from contextlib import nullcontext

from accelerate import Accelerator

from maskcls_hf.training import (
    AccelerateLoop,
    accelerator_options,
    as_script,
    check_finite,
    clip_gradients,
    items_of_step,
    load_recipe,
    prepared_run,
    reraise_as_divergence,
)
from train_trainer import parse_arguments


def train(loop: AccelerateLoop) -> dict[str, float]:
    run, accelerator, model = loop.run, loop.accelerator, loop.model
    for batches in loop.steps():
        losses = {}
        items = items_of_step(batches, loop.network.config, accelerator)  # that the loss of the step is divided by
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(model):
                with reraise_as_divergence(loop.step + 1, loop.out):
                    outputs = model(**batch, num_items_in_batch=items)
                loop.watch(outputs, batch)
                accelerator.backward(outputs.loss * accelerator.num_processes)  # gradients are averaged over processes
            for name, term in {"loss": outputs.loss, **outputs.loss_dict}.items():
                losses[name] = losses.get(name, 0) + term.detach() * accelerator.num_processes
        grad_norm = clip_gradients(accelerator, model, run.recipe.optimizer.clip_norm)
        checked_norm = grad_norm if accelerator.scaler is None else None
        check_finite(losses["loss"], losses, loop.step + 1, loop.out, checked_norm)
        loop.optimizer.step()
        if run.ema:
            run.ema.update(loop.network)
        learning_rate = run.scheduler.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:  # fp16: the gradients overflowed
            run.scheduler.step()
        model.zero_grad()
        loop.end_step(losses, grad_norm, learning_rate)  # log, evaluation, checkpoint
    return loop.finish()


@as_script()
def main(argv: list[str] | None = None) -> dict[str, float]:
    options = vars(parse_arguments(argv, __doc__))
    recipe = load_recipe(options.pop("recipe"), options.pop("set"))
    out, resume, tensorboard = options["out"], options["resume"], options["tensorboard"]
    with prepared_run(recipe, **options) as (run, stop):
        accelerator = Accelerator(**accelerator_options(run, out, tensorboard))
        accelerator.init_trackers("runs")
        loop = AccelerateLoop(run, accelerator, out, stop, resume)
        with stop.patient():
            scores = train(loop)
        accelerator.end_training()
        return scores


if __name__ == "__main__":
    main()

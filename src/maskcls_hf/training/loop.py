"""What a training loop of one's own with Accelerate is made of, beside `Run`: see examples/train_accelerate.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..utils.writing import saving_model
from .checkpoints import epoch_batches
from .divergence import evaluation_after, forward_pass
from .processes import filled_up, items_of_step, own_class, share_buffers, without_copies
from .progress import TrainingLog
from .recipe_trainer import save_results
from .run import Run
from .stopping import StopSignals


def batches_of_steps(run: Run, loader: DataLoader, step: int = 0) -> Iterator[list[dict[str, Any]]]:
    """The batches of each optimiser step, epoch after epoch, from step number `step` on; `loader` is prepared."""
    epoch, done = divmod(step * run.accumulate, len(loader))
    while True:
        batches = iter(epoch_batches(loader, run.sampler, epoch, done))
        while step_batches := list(islice(batches, run.accumulate)):
            yield step_batches
        epoch, done = epoch + 1, 0


def clip_gradients(accelerator: Accelerator, model: nn.Module, clip_norm: float | None) -> Tensor:
    """Norm () of all gradients, which are scaled to `clip_norm` if it is larger; None or 0: they stay."""
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: each process has a share


@torch.no_grad()
def evaluate(
    run: Run, model: nn.Module, loader: DataLoader, accelerator: Accelerator, out: Path, step: int, stop: StopSignals
) -> dict[str, float]:
    """Loss and scores of the averaged weights after `step` steps, their names beginning with `eval_`.

    Args:
        model, loader: prepared by Accelerate; the loader's batches have `ground_truth`.
        out: the run's folder, for messages.
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
            with forward_pass(evaluation_after(step, truth), out):
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
    """Write to `out` the model with its averaged weights, its image processor, the log and the scores. All processes
    call it.

    Raises:
        CannotWrite: names what could not be written, the folder and the cause.
    """
    network = accelerator.unwrap_model(model)
    with run.averaged(network):
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with own_class(network), saving_model(out) as folder:
                network.save_pretrained(folder, state_dict=weights)
                run.image_processor.save_pretrained(folder)
    if accelerator.is_main_process:
        log.save(out)
        save_results(scores, out)

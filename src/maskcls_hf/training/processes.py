"""What the processes of a training share: the divisor of a step's loss, buffers, and with FSDP the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from transformers.utils import logging

from ..models.losses import count_items, count_pixels

logger = logging.get_logger(__name__)


def items_of_step(
    batches: Sequence[Mapping[str, Any]], config: Any, accelerator: Accelerator | None = None, weight: float = 1.0
) -> Tensor:
    """`num_items_in_batch` of one optimizer step: counts of its accumulated batches, over all processes.

    The loss of each batch is then divided by the counts of the whole step. Multiplied by the number of processes, whose
    gradients are averaged, and not divided by the number of accumulated batches, it gives the gradient of the step::

        items = items_of_step(batches, model.config, accelerator)
        for batch in batches:
            loss = model(**batch, num_items_in_batch=items).loss * accelerator.num_processes
            accelerator.backward(loss)  # an Accelerator without gradient_accumulation_steps: it would divide again

    Args:
        batches: of this process; with `class_labels`, or `labels` of a per-pixel model.
        config: of the model.
        accelerator: of the processes; None: there is one.
        weight: of the counts of this process; 0 where its batch is but a copy, see [`without_copies`].

    Returns:
        (3,) float32 for mask classification, see `count_items`; a number of pixels () for a per-pixel model.
    """
    if "class_labels" in batches[0]:
        counts = [count_items(batch["class_labels"], config.num_queries) for batch in batches]
    else:
        counts = [count_pixels(batch["labels"], config.semantic_loss_ignore_index) for batch in batches]
    total = torch.stack(counts).sum(0) * weight
    if accelerator is None:
        return total
    total = total.to(accelerator.device)
    return accelerator.reduce(total, "sum") if accelerator.num_processes > 1 else total


def without_copies(batch: Mapping[str, Any], accelerator: Accelerator) -> tuple[dict[str, Any], float]:
    """An evaluation batch without its copies of other images, and 1; of nothing but copies, the first one and 0.

    Accelerate fills up the last batches of several processes with copies of the first images. `gather_for_metrics`
    takes out their scores again; the loss, and what it is divided by, must not count them either::

        number = len(batch["pixel_values"])
        batch, weight = without_copies(batch, accelerator)
        items = items_of_step([batch], model.config, accelerator, weight)
        outputs = model(**batch, num_items_in_batch=items)  # by all processes
        loss = accelerator.reduce(outputs.loss * weight, "sum")  # of the batches of all processes
        losses = accelerator.gather_for_metrics(loss.repeat(number))

    Args:
        batch: as the collator makes it; what has one entry an image is cut.
        accelerator: that has prepared the loader.

    Returns:
        The batch of this process, and its weight.
    """
    number = len(batch["pixel_values"])
    state, own = accelerator.gradient_state, number
    if accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0:
        own = min(max(state.remainder - accelerator.process_index * number, 0), number)
    one_an_image = {
        name for name, values in batch.items() if isinstance(values, Sequence) or getattr(values, "ndim", 0) > 0
    }
    cut = {
        name: values[: max(own, 1)] if name in one_an_image and len(values) == number else values
        for name, values in batch.items()
    }
    return cut, float(own > 0)


def filled_up(measurements: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Measurements of a batch [`without_copies`] for `number` images again, as `gather_for_metrics` expects them.

    Examples:
        >>> filled_up({"iou": torch.tensor([0.5, 0.7])}, 4)["iou"]
        tensor([0.5000, 0.7000, 0.7000, 0.7000])
    """
    return {
        name: torch.cat([values, values[-1:].expand(number - len(values), *values.shape[1:])])
        for name, values in measurements.items()
    }


def whole_norm(norm: Any) -> Any:
    """Of the gradients; with FSDP each process has the norm of its parts."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the main one: batch norm's running statistics differ after a step.

    The checkpoint has those of the main process; evaluation in all processes should use them too.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def is_main_process() -> bool:
    """Whether this is the process of rank 0, as launchers say in `RANK`."""
    return int(os.environ.get("RANK", 0)) == 0


def is_fsdp_wanted() -> bool:
    """Whether the training was started with FSDP, as by `accelerate launch --use_fsdp`."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def warn_if_not_sharded(accelerator: Accelerator) -> None:
    """Accelerate falls back to DDP without a word where it has no FSDP, such as on CPUs."""
    if is_fsdp_wanted() and accelerator.distributed_type != DistributedType.FSDP:
        logger.warning(
            f"FSDP was asked for, but Accelerate has none here ({accelerator.device.type}, "
            f"{accelerator.distributed_type}): each process holds all weights."
        )


@contextmanager
def accelerate_as_before() -> Iterator[None]:
    """What Accelerate knows of device, precision and loaders, which Trainer sets anew, is afterwards as before."""
    before = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    try:
        yield
    finally:
        for state, values in before:
            state._shared_state.clear()
            state._shared_state.update(values)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Around `save_pretrained`: a model that FSDP2 shards has a class made by torch, and its code would be saved."""
    made = type(model)
    model.__class__ = next(base for base in made.__mro__ if base.__module__.partition(".")[0] != "torch")
    try:
        yield
    finally:
        model.__class__ = made

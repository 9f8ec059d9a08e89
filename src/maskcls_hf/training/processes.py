"""What the processes of a training share: the divisor of a step's loss, buffers, and with FSDP the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from transformers.utils import logging

from ..criterion import count_items, count_pixels

logger = logging.get_logger(__name__)


def items_of_step(batches: Sequence[Mapping[str, Any]], config: Any, accelerator: Accelerator | None = None) -> Tensor:
    """`num_items_in_batch` of one optimiser step: counts of its accumulated batches, over all processes.

    The loss of each batch is then divided by the counts of the whole step. Multiplied by the number of processes, whose
    gradients are averaged, and not divided by the number of accumulated batches, it gives the gradient of the step::

        items = items_of_step(batches, model.config, accelerator)
        for batch in batches:
            loss = model(**batch, num_items_in_batch=items).loss * accelerator.num_processes
            accelerator.backward(loss)  # an Accelerator without gradient_accumulation_steps: it would divide again

    Args:
        batches: of this process; with `class_labels`, or `labels` of a per-pixel model.
        config: of the model.

    Returns:
        (3,) float32 for mask classification, see `count_items`; a number of pixels () for a per-pixel model.
    """
    if "class_labels" in batches[0]:
        counts = [count_items(batch["class_labels"], config.num_queries) for batch in batches]
    else:
        counts = [count_pixels(batch["labels"], config.semantic_loss_ignore_index) for batch in batches]
    total = torch.stack(counts).sum(0)
    if accelerator is None:
        return total
    total = total.to(accelerator.device)
    return accelerator.reduce(total, "sum") if accelerator.num_processes > 1 else total  # type: ignore[return-value]


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the main one: batch norm's running statistics differ after a step.

    The checkpoint has those of the main process; evaluation in all processes should use them too.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def is_fsdp_wanted() -> bool:
    """`accelerate launch --use_fsdp`."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def warn_if_not_sharded(accelerator: Accelerator) -> None:
    """Accelerate falls back to DDP without a word where it has no FSDP, such as on CPUs."""
    if is_fsdp_wanted() and accelerator.distributed_type != DistributedType.FSDP:
        logger.warning(
            f"FSDP was asked for, but Accelerate has none here ({accelerator.device.type}, "
            f"{accelerator.distributed_type}): each process holds all weights."
        )


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Around `save_pretrained`: a model that FSDP2 shards has a class made by torch, and its code would be saved."""
    made = type(model)
    model.__class__ = next(base for base in made.__mro__ if base.__module__.partition(".")[0] != "torch")
    try:
        yield
    finally:
        model.__class__ = made

"""A loss that is NaN or infinite ends a training, before a checkpoint can be written of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.files import some
from .checkpoints import last_good_message
from .processes import whole_norm


class DivergenceError(FloatingPointError):
    """The loss, its gradient or a weight is NaN or infinite. Names the step, the terms and the last good checkpoint."""


def check_finite(
    loss: Tensor,
    loss_dict: Mapping[str, Tensor],
    step: int,
    output: str | Path | None = None,
    grad_norm: Tensor | float | None = None,
) -> None:
    """Refuses a step whose loss or gradient is NaN or infinite.

    Once a step, between backward and the optimizer's step: one transfer to the host, in all processes.

    Args:
        loss: of the step, or the sum of those of its accumulated batches.
        loss_dict: the model's unweighted terms, or their sums.
        step: number of the step, from 1.
        output: the run's folder, where the last good checkpoint is looked for.
        grad_norm: of all gradients, as `clip_grad_norm_` gives it.

    Raises:
        DivergenceError: one of them is NaN or infinite, in any process.

    Examples:
        >>> check_finite(torch.tensor(1.0), {"loss_dice": torch.tensor(0.5)}, step=1)
        >>> check_finite(torch.tensor(1.0), {"loss_dice": torch.tensor(torch.nan)}, step=2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        maskcls_hf.training.divergence.DivergenceError: loss_dice became NaN or infinite in step 2. ...
    """
    values = {**loss_dict, "loss": loss}
    if grad_norm is not None:
        values["gradient norm"] = torch.as_tensor(whole_norm(grad_norm), device=loss.device)
    bad = torch.stack([~torch.isfinite(value.detach()).all() for value in values.values()]).float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    terms = [name for name, is_bad in zip(values, bad.tolist(), strict=True) if is_bad]
    if terms:
        raise DivergenceError(_message(f"{_listed(terms)} became NaN or infinite in step {step}", output))


@contextmanager
def reraise_as_divergence(step: int | str, output: str | Path | None = None) -> Iterator[None]:
    """Around a forward pass: the matcher's error about costs that are not finite becomes a [`DivergenceError`].

    Args:
        step: number of the step, or what else the pass is for, such as "the evaluation after step 9".
        output: the run's folder, where the last good checkpoint is looked for.

    Raises:
        DivergenceError: names the step and the images.
    """
    try:
        yield
    except FloatingPointError as error:  # not by the matcher's class: remote code has one of its own
        moment = f"step {step}" if isinstance(step, int) else step
        raise DivergenceError(_message(f"The matching failed in {moment}. {error}", output)) from error


def evaluation_after(step: int, ground_truth: Sequence[Any] | None) -> str:
    """Of `reraise_as_divergence`: an evaluation of images with their `Segments`."""
    names = some([truth.name for truth in ground_truth or ()])
    return f"the evaluation after step {step}" + (f" (images {names})" if names else "")


def check_weights(model: nn.Module, step: int, output: str | Path | None = None) -> None:
    """Before a checkpoint: weights and buffers are finite. One transfer to the host.

    Args:
        model: with or without wrappers.
        step: number of steps that are done.
        output: the run's folder, where the last good checkpoint is looked for.

    Raises:
        DivergenceError: names those that are not.
    """
    tensors = {
        name: getattr(value, "to_local", lambda value=value: value)().detach()  # FSDP: the part of this process
        for name, value in chain(model.named_parameters(), model.named_buffers())
        if value.is_floating_point()
    }
    bad = torch.stack([~torch.isfinite(value).all() for value in tensors.values()]).tolist()
    names = [name for name, is_bad in zip(tensors, bad, strict=True) if is_bad]
    if names:
        raise DivergenceError(
            _message(f"{_listed(names)} became NaN or infinite by step {step}; this checkpoint is not written", output)
        )


def _message(what: str, output: str | Path | None) -> str:
    advice = "Lower the learning rate, clip gradients, warm up for longer, or check the data for NaN."
    return f"{what.rstrip('.')}. {last_good_message(output)} {advice}"


def _listed(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

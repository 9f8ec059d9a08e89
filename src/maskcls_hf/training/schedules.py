"""Learning rate over a training: linear warmup times a curve, the paper's and the usual ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..models.options import require_range

SCHEDULES = ("poly", "cosine", "multistep", "constant")


def build_scheduler(
    optimizer: Optimizer,
    kind: str,
    max_steps: int,
    warmup_steps: int = 0,
    warmup_factor: float | None = None,
    power: float = 0.9,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    progress: Callable[[int], float] | None = None,
) -> LambdaLR:
    """Scheduler that multiplies each group's learning rate by [`learning_rate_factor`].

    Args:
        progress: share of the training that is done at a step, 0 to 1, where it can run ahead of the steps
            ([`TimeBudget`]); default: the share of steps.

    The other arguments are those of [`learning_rate_factor`], which says what is wrong with them.
    """

    def factor(step: int) -> float:
        position = step if progress is None else max(step, progress(step) * max_steps)
        return learning_rate_factor(
            step, kind, max_steps, warmup_steps, warmup_factor, power, milestones, gamma, position=position
        )

    return LambdaLR(optimizer, factor)


def learning_rate_factor(
    step: int,
    kind: str,
    max_steps: int,
    warmup_steps: int = 0,
    warmup_factor: float | None = None,
    power: float = 0.9,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    position: float | None = None,
) -> float:
    """Part of the full learning rate that the optimiser step number `step`, from 0, is made with.

    Args:
        kind: `"poly"`, (1 - progress) ** power, the paper's for semantic segmentation; `"cosine"` from 1 to 0;
            `"multistep"`, times gamma at each milestone, the paper's for COCO panoptic; `"constant"`.
        max_steps: optimiser steps of the whole training.
        warmup_steps: steps in which a factor rises linearly from `warmup_factor` to 1; the curve goes on underneath,
            as in the paper's code.
        warmup_factor: 0 to 1; default: 1 / (warmup_steps + 1).
        power: of `"poly"`.
        milestones: steps at which `"multistep"` falls, ascending.
        gamma: factor of each fall.
        position: number of steps that count as done for the curve; default: `step`.

    Raises:
        `ValueError`: unknown kind, steps or factors out of range, milestones that do not ascend or are missing.
    """
    _check(kind, max_steps, warmup_steps, warmup_factor, power, milestones, gamma)
    position = min(step if position is None else position, max_steps)
    warmup = 1.0
    if step < warmup_steps:
        start = 1 / (warmup_steps + 1) if warmup_factor is None else warmup_factor
        warmup = start * (1 - step / warmup_steps) + step / warmup_steps
    if kind == "poly":
        return warmup * (1 - position / max_steps) ** power
    if kind == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * position / max_steps))
    if kind == "multistep":
        return warmup * gamma ** sum(position >= milestone for milestone in milestones)
    return warmup


def _check(
    kind: str,
    max_steps: int,
    warmup_steps: int,
    warmup_factor: float | None,
    power: float,
    milestones: Sequence[int],
    gamma: float,
) -> None:
    if kind not in SCHEDULES:
        raise ValueError(f"Unknown schedule {kind!r}, choose one of {list(SCHEDULES)}.")
    require_range("max_steps", max_steps, "[1, inf)", integer=True)
    require_range("warmup_steps", warmup_steps, "[0, inf)", integer=True)
    if warmup_factor is not None:
        require_range("warmup_factor", warmup_factor, "[0, 1]")
    require_range("power", power, "[0, inf)")
    require_range("gamma", gamma, "[0, inf)")
    for milestone in milestones:
        require_range("milestones", milestone, "[1, inf)", integer=True)
    if kind == "multistep" and (not milestones or list(milestones) != sorted(set(milestones))):
        raise ValueError(f"milestones={list(milestones)} of a multistep schedule must be ascending steps, one or more.")

"""AdamW with the parameter groups of the paper's code; the learning rate over a training, the paper's curves and the
usual ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..models.options import require_range

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
POSITION_TABLES = ("relative_position_bias_table", "pos_embed", "position_embeddings")
TOKENS = ("cls_token", "register_tokens", "reg_token")  # of ViTs


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the backbone learns at `backbone_multiplier` times the learning rate (paper
    Section 4.1: 0.1 for ResNets, 1 for Swin); norms, embeddings, tokens and position tables have no weight decay. The
    feature pyramid over a plain ViT is new like the pixel decoder, and learns at the whole rate (as in ViTDet's code).

    Parameters that need no gradient are left out.

    Raises:
        ValueError: a rate, decay or multiplier that is negative, infinite or NaN.
    """
    require_range("learning_rate", learning_rate, "[0, inf)")
    require_range("weight_decay", weight_decay, "[0, inf)")
    require_range("backbone_multiplier", backbone_multiplier, "[0, inf)")
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            parts = module_name.split(".")
            in_backbone = "backbone" in parts and "feature_pyramid" not in parts
            undecayed = isinstance(module, (*NORMS, nn.Embedding)) or name.endswith(POSITION_TABLES + TOKENS)
            key = (
                learning_rate * (backbone_multiplier if in_backbone else 1.0),
                0.0 if undecayed else weight_decay,
            )
            groups[key].append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over [`parameter_groups`].

    Raises:
        ValueError: as [`parameter_groups`]; betas outside [0, 1).
    """
    for beta in betas:
        require_range("betas", beta, "[0, 1)")
    groups = parameter_groups(model, learning_rate, weight_decay, backbone_multiplier)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), weight_decay=weight_decay)


# -- learning rate --------------------------------------------------------------------------------------------------

SCHEDULES = ("poly", "cosine", "multistep", "constant")


def build_scheduler(
    optimizer: Optimizer, kind: str, max_steps: int, progress: Callable[[int], float] | None = None, **shape: Any
) -> LambdaLR:
    """Scheduler that multiplies each group's learning rate by [`learning_rate_factor`].

    Args:
        progress: share of the training that is done at a step, 0 to 1, where it can run ahead of the steps
            ([`TimeBudget`]); default: the share of steps.
        shape: the other arguments of [`learning_rate_factor`], which says what is wrong with them.
    """

    def factor(step: int) -> float:
        position = step if progress is None else max(step, progress(step) * max_steps)
        return learning_rate_factor(step, kind, max_steps, position=position, **shape)

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
    """Part of the full learning rate that the optimizer step number `step`, from 0, is made with.

    Args:
        kind: `"poly"`, (1 - progress) ** power, the paper's for semantic segmentation; `"cosine"` from 1 to 0;
            `"multistep"`, times gamma at each milestone, the paper's for COCO panoptic; `"constant"`.
        max_steps: optimizer steps of the whole training.
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

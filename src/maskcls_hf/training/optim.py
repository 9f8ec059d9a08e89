"""AdamW with the parameter groups of the paper's code, and the learning rate over a training.

Its curves are the paper's and the usual ones.
"""

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

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
_POSITION_TABLES = ("relative_position_bias_table", "pos_embed", "position_embeddings")
_TOKENS = ("cls_token", "register_tokens", "reg_token")  # of ViTs


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
    layer_decay: float = 1.0,
    decay_query_blocks: bool = True,
    decay_norms: bool = False,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: rates of backbone and rest, and what has no weight decay.

    The backbone learns at `backbone_multiplier` times the learning rate (paper Section 4.1: 0.1 for ResNets, 1 for
    Swin); norms, embeddings, tokens and position tables have no weight decay. The feature pyramid over a plain ViT is
    new like the pixel decoder, and learns at the whole rate (as in ViTDet's code).

    Parameters that need no gradient are left out. `of_backbone` of a group is for [`build_scheduler`].

    Args:
        model: without wrappers.
        learning_rate: of all but the backbone.
        weight_decay: of AdamW.
        backbone_multiplier: of the backbone's learning rate.
        layer_decay: of a plain ViT block i of N learns at layer_decay ** (N - 1 - i) times the backbone's rate, its
            embeddings as block 0, and its last norm at all of it (EoMT's code has 0.8).
        decay_query_blocks: False: an EoMT's blocks with queries learn at all of it, too (as its code with DINOv3).
        decay_norms: norms, embeddings, tokens and position tables have weight decay like the rest (as EoMT's code).

    Raises:
        ValueError: a rate, decay or multiplier that is negative, infinite or NaN; `layer_decay` without a plain ViT.

    Examples:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.LayerNorm(2)})
        >>> groups = parameter_groups(model, 1e-4, 0.05, backbone_multiplier=0.1)
        >>> [(f"{group['lr']:.0e}", group["weight_decay"], group["of_backbone"]) for group in groups]
        [('1e-04', 0.0, False), ('1e-05', 0.05, True)]
    """
    require_range("learning_rate", learning_rate, "[0, inf)")
    require_range("weight_decay", weight_decay, "[0, inf)")
    require_range("backbone_multiplier", backbone_multiplier, "[0, inf)")
    require_range("layer_decay", layer_decay, "(0, 1]")
    layers_above = {} if layer_decay == 1 else _blocks_above(model, decay_query_blocks)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            parts = module_name.split(".")
            in_backbone = ("backbone" in parts or "vit" in parts) and "feature_pyramid" not in parts
            undecayed = isinstance(module, (*_NORMS, nn.Embedding)) or name.endswith(_POSITION_TABLES + _TOKENS)
            multiplier = backbone_multiplier * layer_decay ** layers_above.get(id(parameter), 0)
            key = (
                learning_rate * (multiplier if in_backbone else 1.0),
                0.0 if undecayed and not decay_norms else weight_decay,
                not in_backbone,
            )
            groups[key].append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay, "of_backbone": not is_new}
        for (lr, decay, is_new), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _blocks_above(model: nn.Module, count_query_blocks: bool = True) -> dict[int, int]:
    """How many blocks of a plain ViT come after a parameter's own, by its id; of embeddings, after the first.

    Raises:
        ValueError: the model has no plain ViT.
    """
    vit = next((module for name, module in model.named_modules() if name.rpartition(".")[2] == "vit"), None)
    if vit is None:
        raise ValueError("layer_decay is for the blocks of a plain ViT, which this model has not: leave it at 1.")
    lists = [(name, m) for name, m in vit.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    path, blocks = max(lists, key=lambda item: len(item[1]))
    whole_rate = 0 if count_query_blocks else getattr(model.config, "query_blocks", 0)
    above, number, is_past = {}, 0, False
    for name, parameter in vit.named_parameters():  # in the order of the network
        if name.startswith(f"{path}."):
            number, is_past = int(name.removeprefix(f"{path}.").split(".")[0]), True
        elif is_past:
            break
        after = len(blocks) - 1 - number
        above[id(parameter)] = after if after >= whole_rate else 0
    return above


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    **options: Any,
) -> torch.optim.AdamW:
    """AdamW over [`parameter_groups`].

    Args:
        model: see [`parameter_groups`].
        learning_rate: see [`parameter_groups`].
        weight_decay: see [`parameter_groups`].
        backbone_multiplier: see [`parameter_groups`].
        betas: of AdamW.
        options: `layer_decay`, `decay_query_blocks`, `decay_norms`: see [`parameter_groups`].

    Raises:
        ValueError: as [`parameter_groups`]; betas outside [0, 1).
    """
    for beta in betas:
        require_range("betas", beta, "[0, 1)")
    groups = parameter_groups(model, learning_rate, weight_decay, backbone_multiplier, **options)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), weight_decay=weight_decay)


# -- learning rate --------------------------------------------------------------------------------------------------

SCHEDULES = ("poly", "cosine", "multistep", "constant")


def build_scheduler(
    optimizer: Optimizer, kind: str, max_steps: int, progress: Callable[[int], float] | None = None, **shape: Any
) -> LambdaLR:
    """Scheduler that multiplies each group's learning rate by [`learning_rate_factor`].

    Its `of_backbone` is that of the group, as [`parameter_groups`] says.

    Args:
        optimizer: such as of [`build_optimizer`].
        kind: of curve, one of `SCHEDULES`.
        max_steps: optimizer steps of the whole training.
        progress: share of the training that is done at a step, 0 to 1, where it can run ahead of the steps
            ([`TimeBudget`]); default: the share of steps.
        shape: the other arguments of [`learning_rate_factor`], which says what is wrong with them.
    """

    def factor_of(of_backbone: bool) -> Callable[[int], float]:
        def factor(step: int) -> float:
            position = step if progress is None else max(step, progress(step) * max_steps)
            return learning_rate_factor(step, kind, max_steps, position=position, of_backbone=of_backbone, **shape)

        return factor

    return LambdaLR(optimizer, [factor_of(group.get("of_backbone", False)) for group in optimizer.param_groups])


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
    backbone_warmup_steps: int = 0,
    of_backbone: bool = False,
) -> float:
    """Part of the full learning rate that the optimizer step number `step`, from 0, is made with.

    Args:
        step: number of steps that are done.
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
        backbone_warmup_steps: above 0 the backbone waits at 0 for the `warmup_steps` of what is new, and then warms up
            for so many steps; a poly or cosine curve begins after the warm-up (as EoMT's code).
        of_backbone: the factor of the backbone's rate.

    Raises:
        ValueError: unknown kind, steps or factors out of range, milestones that do not ascend or are missing.

    Examples:
        >>> [round(learning_rate_factor(step, "poly", max_steps=100), 3) for step in (0, 50, 100)]
        [1.0, 0.536, 0.0]
        >>> learning_rate_factor(700, "multistep", max_steps=1000, milestones=[600, 900])
        0.1
    """
    if kind not in SCHEDULES:
        raise ValueError(f"Unknown schedule {kind!r}, choose one of {list(SCHEDULES)}.")
    require_range("max_steps", max_steps, "[1, inf)", integer=True)
    require_range("warmup_steps", warmup_steps, "[0, inf)", integer=True)
    require_range("backbone_warmup_steps", backbone_warmup_steps, "[0, inf)", integer=True)
    if warmup_factor is not None:
        require_range("warmup_factor", warmup_factor, "[0, 1]")
    require_range("power", power, "[0, inf)")
    require_range("gamma", gamma, "[0, inf)")
    for milestone in milestones:
        require_range("milestones", milestone, "[1, inf)", integer=True)
    if kind == "multistep" and (not milestones or list(milestones) != sorted(set(milestones))):
        raise ValueError(f"milestones={list(milestones)} of a multistep schedule must be ascending steps, one or more.")
    position = min(step if position is None else position, max_steps)
    progress = position / max_steps
    if backbone_warmup_steps:
        wait = warmup_steps if of_backbone else 0
        step, warmup_steps = step - wait, backbone_warmup_steps if of_backbone else warmup_steps
        begin = wait + warmup_steps
        progress = min(1.0, max(0.0, position - begin) / max(1, max_steps - begin))
        if step < 0:
            return 0.0
    warmup = 1.0
    if step < warmup_steps:
        start = 1 / (warmup_steps + 1) if warmup_factor is None else warmup_factor
        warmup = start * (1 - step / warmup_steps) + step / warmup_steps
    if kind == "poly":
        return float(warmup * (1 - progress) ** power)
    if kind == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "multistep":
        return warmup * gamma ** sum(position >= milestone for milestone in milestones)
    return warmup

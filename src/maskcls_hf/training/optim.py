"""AdamW with the parameter groups of the paper's code."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..models.options import require_range

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
POSITION_TABLES = ("relative_position_bias_table", "pos_embed", "position_embeddings")
TOKENS = ("cls_token", "register_tokens", "reg_token")  # of ViTs


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimiser: the backbone learns at `backbone_multiplier` times the learning rate (paper
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

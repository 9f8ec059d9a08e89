"""Focal and dice of masks: paired for the loss, every query against every segment for the matching.

Both treat a mask as a set of P pixels; `counted` leaves pixels out: void and padding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2  # both as in RetinaNet and the paper's code


def paired_losses(logits: Tensor, targets: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Focal loss (RetinaNet, Eq. 5; mean over pixels) and dice loss (V-Net; 1 added to both parts as in the paper's
    code) of M masks with their segments: (M, P), (M, P) bool, (M, P) bool -> (M,), (M,).

    Both follow from how wrong each pixel is, 1 - p_t, so that one sigmoid serves both.
    """
    signed = torch.where(targets, -logits, logits)
    wrong = signed.sigmoid()  # 1 - p_t
    focal = torch.where(targets, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong**FOCAL_GAMMA * F.softplus(signed)
    pixels: Tensor | int = logits.shape[1]
    if counted is not None:
        focal, wrong, targets = focal * counted, wrong * counted, targets & counted
        pixels = counted.sum(1).clamp(min=1)
    area, missed = targets.sum(1), (wrong * targets).sum(1)
    overlap = area - missed
    dice = 1 - (2 * overlap + 1) / (2 * overlap + wrong.sum(1) + 1)  # sum of p and of the target, plus 1
    return focal.sum(1) / pixels, dice


def pairwise_focal(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean focal loss of N masks against M segments: (N, P), (M, P), (P,) -> (N, M)."""
    probabilities = logits.sigmoid()
    if_inside = FOCAL_ALPHA * (1 - probabilities) ** FOCAL_GAMMA * F.softplus(-logits) * counted  # (N, P)
    if_outside = (1 - FOCAL_ALPHA) * probabilities**FOCAL_GAMMA * F.softplus(logits) * counted
    cost = (if_inside - if_outside) @ targets.T + if_outside.sum(1, keepdim=True)
    return cost / counted.sum().clamp(min=1)


def pairwise_dice(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Dice loss of N masks against M segments: (N, P), (M, P), (P,) -> (N, M)."""
    probabilities, targets = logits.sigmoid() * counted, targets * counted
    overlap = 2 * (probabilities @ targets.T)
    return 1 - (overlap + 1) / (probabilities.sum(1, keepdim=True) + targets.sum(1) + 1)

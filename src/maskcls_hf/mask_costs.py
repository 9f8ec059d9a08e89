"""Focal and dice of masks: paired for the loss, every query against every segment for the matching.

Both treat a mask as a set of P pixels; `counted` (0 or 1) leaves pixels out: void and padding.
"""

from torch import Tensor
from torch.nn import functional as F

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2  # both as in RetinaNet and the paper's code


def paired_focal(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean focal loss (RetinaNet, Eq. 5) over the counted pixels of each pair: (M, P), (M, P), (M, P) -> (M,)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probabilities = logits.sigmoid()
    wrong = probabilities + targets - 2 * probabilities * targets  # 1 - p_t
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return (alpha * wrong**FOCAL_GAMMA * cross_entropy * counted).sum(1) / counted.sum(1).clamp(min=1)


def paired_dice(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Dice loss (V-Net; 1 added to both parts as in the paper's code) of each pair: (M, P) three times -> (M,)."""
    probabilities, targets = logits.sigmoid() * counted, targets * counted
    return 1 - (2 * (probabilities * targets).sum(1) + 1) / (probabilities.sum(1) + targets.sum(1) + 1)


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

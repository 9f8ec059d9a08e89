"""Focal and dice of masks: paired for the loss, every query against every segment for the matching.

Both treat a mask as a set of P pixels; `counted` leaves pixels out: void and padding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2  # both as in RetinaNet and the paper's code
CPU_SLICE = 2**17  # pixels of masks at a time: what is made of them stays in a core's cache
DEVICE_SLICE = 2**26


def paired_losses(logits: Tensor, targets: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Focal loss (RetinaNet, Eq. 5; mean over pixels) and dice loss (V-Net; 1 added to both parts as in the paper's
    code) of M masks with their segments, at the resolution of the segments.

    Args:
        logits (`torch.Tensor` of shape `(M, h, w)`): upsampled bilinearly to (H, W).
        targets (`torch.Tensor` of shape `(M, H, W)`): bool.
        counted (`torch.Tensor` of shape `(M, H, W)`, *optional*): bool; None: all pixels count.

    Returns:
        focal and dice loss, (M,) each.
    """
    return _PairedLosses.apply(logits, targets, counted)  # type: ignore[no-untyped-call, return-value]


class _PairedLosses(torch.autograd.Function):
    """Losses and their gradients in one pass, a few masks at a time: of the full resolution nothing is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        number, (height, width) = len(logits), targets.shape[1:]
        # Bilinear interpolation as two matrix products; transposed, they carry gradients back.
        rows, columns = (_interpolation(a, b, logits) for a, b in zip(targets.shape[1:], logits.shape[1:], strict=True))
        losses = logits.new_empty(2, number)
        gradients = logits.new_empty(2, *logits.shape) if ctx.needs_input_grad[0] else None
        step = max(1, (CPU_SLICE if logits.device.type == "cpu" else DEVICE_SLICE) // (height * width))
        for part in (slice(start, start + step) for start in range(0, number, step)):
            upsampled = (rows @ logits[part] @ columns.T).flatten(1)
            inside = targets[part].flatten(1).to(logits.dtype)
            looked_at = None if counted is None else counted[part].flatten(1).to(logits.dtype)
            losses[:, part], slopes = _losses_and_slopes(upsampled, inside, looked_at, gradients is not None)
            if gradients is not None and slopes is not None:
                gradients[:, part] = rows.T @ (slopes.unflatten(2, (height, width)) @ columns)
        ctx.save_for_backward(gradients)
        return losses[0], losses[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal: Tensor, dice: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        of_focal, of_dice = ctx.saved_tensors[0]
        return focal.view(-1, 1, 1) * of_focal + dice.view(-1, 1, 1) * of_dice, None, None


def _losses_and_slopes(
    logits: Tensor, targets: Tensor, counted: Tensor | None, with_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Focal and dice (2, M) of masks (M, P), and their derivatives by the logits (2, M, P).

    Both follow from how wrong each pixel is, 1 - p_t, so that one sigmoid serves both.
    """
    signs = 1 - 2 * targets
    signed = logits * signs
    wrong = signed.sigmoid()  # 1 - p_t
    surprise = F.softplus(signed)  # -log(p_t)
    weights = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * targets
    missed, pixels = wrong, torch.full_like(logits[:, 0], logits.shape[1])
    if counted is not None:
        weights, missed, targets = weights * counted, wrong * counted, targets * counted
        pixels = counted.sum(1).clamp(min=1)
    weighted = weights * wrong**FOCAL_GAMMA
    focal = (weighted * surprise).sum(1) / pixels

    overlap = 2 * (targets.sum(1) - (missed * targets).sum(1)) + 1
    total = missed.sum(1)
    union = overlap + total  # sum of p and of the target, plus 1
    losses = torch.stack([focal, total / union])  # dice: 1 - overlap / union
    if not with_slopes:
        return losses, None
    right = 1 - wrong
    by_focal = weighted * (FOCAL_GAMMA * right * surprise + wrong) * signs / pixels[:, None]
    by_wrong = (overlap / union**2)[:, None] + targets * (2 * total / union**2)[:, None]
    return losses, torch.stack([by_focal, missed * right * signs * by_wrong])


def _interpolation(full: int, cells: int, like: Tensor) -> Tensor:
    """Matrix (full, cells) of bilinear interpolation along one axis, edges as in `align_corners=False`."""
    basis = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(basis, size=full, mode="linear", align_corners=False)[0].T


def pairwise_losses(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean focal loss and dice loss of N masks with M segments: (N, P), (M, P), (P,) floats -> (N, M), (N, M)."""
    probabilities = logits.sigmoid()
    if_inside = FOCAL_ALPHA * (1 - probabilities) ** FOCAL_GAMMA * F.softplus(-logits)  # (N, P)
    if_outside = (1 - FOCAL_ALPHA) * probabilities**FOCAL_GAMMA * F.softplus(logits) * counted
    targets = targets * counted
    difference, overlap = torch.stack([if_inside - if_outside, probabilities]) @ targets.T
    focal = (difference + if_outside.sum(1, keepdim=True)) / counted.sum().clamp(min=1)
    areas = (probabilities * counted).sum(1, keepdim=True) + targets.sum(1)
    return focal, 1 - (2 * overlap + 1) / (areas + 1)

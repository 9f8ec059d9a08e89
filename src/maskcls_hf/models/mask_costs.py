"""Focal and dice of masks: paired for the loss, every query against every segment for the matching.

Both treat a mask as a set of P pixels; `counted` leaves pixels out: void and padding.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2  # both as in RetinaNet and the paper's code
CPU_SLICE = 2**18  # pixels of masks at a time: what is made of them stays in a core's cache
CPU_TILE = (128, 128)  # of one mask at most: small tiles depend on few cells, which keeps the matrices small
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
    """Losses and their gradients in one pass, a tile of a few masks at a time: of the full resolution nothing is kept.

    Dice of a whole mask is not known before its last tile. Its derivative is a sum of two slopes, though, whose weights
    alone depend on the whole: both are carried back to the resolution of the logits, and weighted there.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        on_cpu = logits.device.type == "cpu"
        slice_size, largest_tile = (CPU_SLICE, CPU_TILE) if on_cpu else (DEVICE_SLICE, targets.shape[1:])
        tile = [min(length, most) for length, most in zip(targets.shape[1:], largest_tile, strict=True)]
        rows = _strips(targets.shape[1], tile[0], logits.shape[1], logits)
        columns = _strips(targets.shape[2], tile[1], logits.shape[2], logits)
        losses = logits.new_empty(2, len(logits))
        gradients = logits.new_empty(2, *logits.shape) if ctx.needs_input_grad[0] else None
        step = max(1, slice_size // math.prod(tile))
        for part in (slice(start, start + step) for start in range(0, len(logits), step)):
            sums = logits.new_zeros(5, len(logits[part]))
            slopes = None if gradients is None else logits.new_zeros(3, *logits[part].shape)
            for row, column in itertools.product(rows, columns):
                upsampled = row.matrix @ logits[part, row.cells, column.cells] @ column.matrix.T
                inside = targets[part, row.pixels, column.pixels].to(logits.dtype)
                looked_at = None if counted is None else counted[part, row.pixels, column.pixels].to(logits.dtype)
                of_tile, at_pixels = _sums_and_slopes(upsampled, inside, looked_at, slopes is not None)
                sums += of_tile
                if slopes is not None and at_pixels is not None:
                    slopes[:, :, row.cells, column.cells] += row.matrix.T @ (at_pixels @ column.matrix)
            losses[:, part], weights = _losses_of_sums(sums)
            if gradients is not None and slopes is not None:
                by_focal, by_missed, by_missed_inside = weights[:, :, None, None] * slopes
                gradients[:, part] = torch.stack([by_focal, by_missed + by_missed_inside])
        ctx.save_for_backward(gradients)
        return losses[0], losses[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal: Tensor, dice: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        of_focal, of_dice = ctx.saved_tensors[0]
        return focal.view(-1, 1, 1) * of_focal + dice.view(-1, 1, 1) * of_dice, None, None


def _sums_and_slopes(
    logits: Tensor, targets: Tensor, counted: Tensor | None, with_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """What the losses of M masks (M, H, W) are made of: sums over pixels (5, M) of the focal loss, of how wrong each
    pixel is (1 - p_t), of that inside the segment, of the segment, and of all pixels; and the derivatives of the first
    three by the logits (3, M, H, W)."""

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return torch.linalg.vecdot(one.flatten(1), other.flatten(1))

    signs = 1 - 2 * targets
    signed = logits * signs
    wrong = signed.sigmoid()  # 1 - p_t
    surprise = F.softplus(signed)  # -log(p_t)
    weights = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * targets
    missed = wrong
    if counted is not None:
        weights, missed, targets = weights * counted, wrong * counted, targets * counted
    weighted = weights * wrong**FOCAL_GAMMA
    sums = logits.new_empty(5, len(logits))
    sums[0], sums[1], sums[2] = dot(weighted, surprise), missed.sum((1, 2)), dot(missed, targets)
    sums[3], sums[4] = targets.sum((1, 2)), logits[0].numel() if counted is None else counted.sum((1, 2))
    if not with_slopes:
        return sums, None
    right = 1 - wrong
    slopes = logits.new_empty(3, *logits.shape)
    torch.mul(torch.addcmul(wrong, right, surprise, value=FOCAL_GAMMA).mul_(weighted), signs, out=slopes[0])
    torch.mul(missed * right, signs, out=slopes[1])
    torch.mul(slopes[1], targets, out=slopes[2])
    return sums, slopes


def _losses_of_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss (2, M), and the weights (3, M) of the slopes: of the first in the derivative of focal, of the
    others in that of dice."""
    focal, missed, missed_inside, area, pixels = sums
    pixels = pixels.clamp(min=1)
    overlap = 2 * (area - missed_inside) + 1
    union = overlap + missed  # sum of p and of the target, plus 1
    losses = torch.stack([focal / pixels, missed / union])  # dice: 1 - overlap / union
    return losses, torch.stack([1 / pixels, overlap / union**2, 2 * missed / union**2])


class _Strip(NamedTuple):
    """Some pixels of one axis, and the cells between which they are interpolated."""

    pixels: slice
    cells: slice
    matrix: Tensor  # (pixels, cells); transposed, it carries gradients back


def _strips(pixels: int, of_strip: int, cells: int, like: Tensor) -> list[_Strip]:
    """Bilinear interpolation along one axis, edges as in `align_corners=False`, in strips of `of_strip` pixels."""
    basis = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    matrix = F.interpolate(basis, size=pixels, mode="linear", align_corners=False)[0].T
    strips = []
    for start in range(0, pixels, of_strip):
        inside = slice(start, min(start + of_strip, pixels))
        # A pixel's cells lie around its centre; at the borders of the map there are fewer.
        first = max(0, math.floor((inside.start + 0.5) * cells / pixels - 0.5))
        last = min(cells, math.floor((inside.stop - 0.5) * cells / pixels - 0.5) + 2)
        strips.append(_Strip(inside, slice(first, last), matrix[inside, first:last]))
    return strips


def pairwise_losses(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean focal loss and dice loss of N masks with M segments: (N, P), (M, P), (P,) floats -> (N, M), (N, M)."""
    targets = targets * counted
    step = max(1, (CPU_SLICE if logits.device.type == "cpu" else DEVICE_SLICE) // max(1, len(logits)))
    slices = zip(logits.split(step, 1), targets.split(step, 1), counted.split(step), strict=True)
    sums_of_slices = zip(*(_pairwise_sums(*part) for part in slices), strict=True)
    difference, overlap, outside, area = (torch.stack(sums).sum(0) for sums in sums_of_slices)
    focal = (difference + outside[:, None]) / counted.sum().clamp(min=1)
    return focal, 1 - (2 * overlap + 1) / (area[:, None] + targets.sum(1) + 1)


def _pairwise_sums(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over pixels: how much more the focal loss is inside a segment than outside, and the overlap, (N, M) each; the
    focal loss where nothing is inside, and the area of the masks, (N,) each. `targets` are 0 where nothing counts."""
    probabilities = logits.sigmoid()
    surprise = F.softplus(-logits)  # -log(p); -log(1 - p) is the logit more
    if_inside = FOCAL_ALPHA * (1 - probabilities) ** FOCAL_GAMMA * surprise  # (N, P)
    if_outside = (1 - FOCAL_ALPHA) * probabilities**FOCAL_GAMMA * (surprise + logits) * counted
    difference, overlap = torch.stack([if_inside - if_outside, probabilities]) @ targets.T
    return difference, overlap, if_outside.sum(1), (probabilities * counted).sum(1)


def dice_coefficient(overlap: Tensor, areas: Tensor) -> Tensor:
    """2 |a and b| / (|a| + |b|) in 0..1; 0 where both are empty. Nothing is added to the parts, unlike in the losses:
    a mask beside a segment has a Dice of 0, however small they are."""
    return 2 * overlap / areas.clamp(min=torch.finfo(areas.dtype).tiny)


def pairwise_dice(probabilities: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
    """Dice (N, M) of N soft masks (N, P) with M segments (M, P)."""
    probabilities, masks = probabilities * counted, masks * counted
    return dice_coefficient(probabilities @ masks.T, probabilities.sum(1, keepdim=True) + masks.sum(1))

"""Boxes: of masks, their two forms, and how far they are from each other.

A box is (x0, y0, x1, y1), its corners, or (cx, cy, w, h), its centre and size.
"""

import torch
from torch import Tensor


def boxes_of_masks(pixels: Tensor, number: int, counted: Tensor | None = None) -> Tensor:
    """Corners of the boxes around the segments of one image, in pixels, (M, 4) int64.

    x1 and y1 are the column and the row after the last: a pixel has a box of size 1, and the box of a full image is
    the image. A segment without pixels gets zeros.

    Args:
        pixels: a stack of masks (M, H, W) bool, or a map (H, W) of places 0..M-1 and -1, of which no stack is made.
        number: M.
        counted (`torch.Tensor` of shape `(H, W)`, *optional*): bool; None: all pixels count.
    """
    if pixels.ndim == 3:
        masks = pixels if counted is None else pixels & counted
        in_row, in_column = masks.any(2), masks.any(1)  # (M, H), (M, W)
    else:
        height, width = pixels.shape
        places = (pixels if counted is None else pixels.where(counted, -1)).long() + 1  # 0: in no segment
        in_row = places.new_zeros(number + 1, height, dtype=torch.bool)
        in_column = places.new_zeros(number + 1, width, dtype=torch.bool)
        in_row[places, torch.arange(height, device=places.device)[:, None]] = True
        in_column[places, torch.arange(width, device=places.device)] = True
        in_row, in_column = in_row[1:], in_column[1:]
    (top, bottom), (left, right) = _ends(in_row), _ends(in_column)
    return torch.stack([left, top, right, bottom], dim=1)


def _ends(present: Tensor) -> tuple[Tensor, Tensor]:
    """First index that is True and the one after the last, of each row (M, n) bool; 0 and 0 where none is."""
    length = present.shape[1]
    numbers = torch.arange(1, length + 1, device=present.device)
    last = (present * numbers).amax(1)
    first = length - (present * numbers.flip(0)).amax(1)
    return torch.where(last > 0, first, 0), last


def has_box(boxes: Tensor) -> Tensor:
    """Whether segments have one: (..., 4), (cx, cy, w, h) -> (...), bool. What has a pixel has a width."""
    return boxes[..., 2] > 0


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1), each (..., 4)."""
    centres, sizes = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)


def to_centres(corners: Tensor) -> Tensor:
    """(x0, y0, x1, y1) -> (cx, cy, w, h), each (..., 4)."""
    first, last = corners[..., :2], corners[..., 2:]
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def generalized_box_iou(corners: Tensor, others: Tensor) -> Tensor:
    """GIoU in -1..1 (Rezatofighi et al., CVPR 2019) of boxes (..., 4) and (..., 4), which broadcast: (M, 4) and (M, 4)
    give (M,), the pairs; (N, 1, 4) and (M, 4) give (N, M), all of them. Boxes without area have an IoU of 0."""

    def area(first: Tensor, last: Tensor) -> Tensor:
        width, height = (last - first).clamp(min=0).unbind(-1)
        return width * height

    (first, last), (other_first, other_last) = (boxes.split(2, dim=-1) for boxes in (corners, others))
    overlap = area(torch.maximum(first, other_first), torch.minimum(last, other_last))
    union = area(first, last) + area(other_first, other_last) - overlap
    hull = area(torch.minimum(first, other_first), torch.maximum(last, other_last))
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def box_losses(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and 1 - GIoU of boxes (cx, cy, w, h), which broadcast as in `generalized_box_iou` (DETR)."""
    distance = (boxes - targets).abs().sum(-1)
    return distance, 1 - generalized_box_iou(to_corners(boxes), to_corners(targets))

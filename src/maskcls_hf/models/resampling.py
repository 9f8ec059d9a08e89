"""Sizes of a batch, and the resampling and padding that images, labels and logits share. Sizes are (height, width)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width


def resized_size(image_size: tuple[int, int], size: SizeDict, rounding: str = "down") -> tuple[int, int]:
    """Height and width of an image after resizing; never below 1.

    Args:
        image_size: height and width before.
        size: shortest and / or longest edge, height and width, or their maxima.
        rounding: of the edge that follows from the other, "down" as transformers or "nearest" as EoMT's code.
    """
    if rounding == "nearest" and (size.shortest_edge or size.longest_edge):
        shortest = size.shortest_edge or math.inf
        factor = min(shortest / min(image_size), (size.longest_edge or math.inf) / max(image_size))
        new_size = (round(image_size[0] * factor), round(image_size[1] * factor))
    elif size.shortest_edge or size.longest_edge:
        # without a shortest edge the longest decides: any larger number does
        shortest = size.shortest_edge or max(image_size) * (size.longest_edge or 1)
        new_size = get_size_with_aspect_ratio(image_size, shortest, size.longest_edge)
    elif size.max_height and size.max_width:
        new_size = get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
    elif size.height and size.width:
        new_size = (size.height, size.width)
    else:
        raise ValueError(
            "size needs shortest_edge and / or longest_edge, height and width, or max_height and max_width; "
            f"got {dict(size)}."
        )
    return max(1, new_size[0]), max(1, new_size[1])


def windows_along(length: int, window: int) -> list[tuple[int, int]]:
    """First pixel and end of as few windows as cover an axis, evenly spread; the last one ends at the edge.

    Examples:
        >>> windows_along(100, 60)
        [(0, 60), (40, 100)]
    """
    count, last = max(1, math.ceil(length / window)), max(0, length - window)
    starts = [i * last // max(count - 1, 1) for i in range(count)]
    return [(start, min(start + window, length)) for start in starts]


def padded_sizes(
    sizes: list[tuple[int, int]], do_pad: bool | None, pad_size: SizeDict | None, size_divisor: int | None
) -> list[tuple[int, int]]:
    """The size that each image of a batch is padded to: one for all, unless `do_pad` is off.

    Args:
        sizes: of the images.
        do_pad: False or None: nothing is padded.
        pad_size: of all images. None: that of the largest.
        size_divisor: of which that is rounded up to a multiple. None: 1.

    Raises:
        ValueError: an image is larger than `pad_size`.

    Examples:
        >>> padded_sizes([(60, 80), (50, 90)], do_pad=True, pad_size=None, size_divisor=32)
        [(64, 96), (64, 96)]
    """
    if not do_pad:
        return sizes
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    if pad_size is None:
        divisor = size_divisor or 1
        return [(_multiple(largest[0], divisor), _multiple(largest[1], divisor))] * len(sizes)
    if not (pad_size.height and pad_size.width):
        raise ValueError(f"pad_size needs height and width, got {dict(pad_size)}.")
    padded = (pad_size.height, pad_size.width)
    for i, (height, width) in enumerate(sizes):
        if height > padded[0] or width > padded[1]:
            raise ValueError(
                f"image {i} is {height} x {width} after resizing, larger than pad_size {padded[0]} x {padded[1]} "
                "(height x width): raise pad_size or lower size."
            )
    return [padded] * len(sizes)


def _multiple(length: int, divisor: int) -> int:
    return math.ceil(length / divisor) * divisor


# ---- the three rules: nearest by floor, nearest at centers, bilinear ----


def nearest_indices(size: int, out_size: int, device: torch.device, at_centers: bool = False) -> Tensor:
    """Which of the `size` pixels of an axis each of `out_size` pixels gets: (out_size,) int64.

    Args:
        size: pixels before.
        out_size: pixels after.
        device: of the result.
        at_centers: the pixel under its center, as torch's "nearest-exact"; else by floor, the one under its first edge,
            as "nearest", with which the paper's code brings masks to the size of the logits.

    Examples:
        >>> nearest_indices(4, 2, "cpu").tolist(), nearest_indices(4, 2, "cpu", at_centers=True).tolist()
        ([0, 2], [1, 3])
    """
    return torch.arange(int(at_centers), 2 * out_size, 2, device=device) * size // (2 * out_size)  # in half pixels


def resize_nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) -> (..., *size): the value under each pixel's center, exact for every dtype."""
    if labels.shape[-2:] == tuple(size):
        return labels
    rows, columns = (
        nearest_indices(source, length, labels.device, at_centers=True)
        for length, source in zip(size, labels.shape[-2:], strict=True)
    )
    # along rows torch.gather takes a sixth of the time of index_select
    return labels.index_select(-2, rows).gather(-1, columns.expand(*labels.shape[:-2], size[0], -1))


def interpolate(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size), bilinear with half-pixel centers."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def bilinear_matrix(size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same along one axis, as a matrix (out_size, size); transposed, it carries gradients back.

    Args:
        size: cells of the axis.
        out_size: pixels that it becomes.
        dtype: of the result.
        device: of the result.

    Examples:
        >>> bilinear_matrix(2, 4, torch.float32, "cpu").tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    basis = torch.eye(size, dtype=dtype, device=device)[None]
    return F.interpolate(basis, size=out_size, mode="linear", align_corners=False)[0].T


def bilinear_windows(positions: Tensor, size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """How positions (T, n) of an axis of `out_size` follow from one of `size`: the positions there that each row of
    them lies between (T, window), and the matrices (T, window, n).

    Args:
        positions: rising in each row.
        size: positions of the axis before.
        out_size: positions of the axis after.
    """
    source = ((positions.float() + 0.5) * (size / out_size) - 0.5).clamp(min=0, max=size - 1)
    lower = source.long()
    upper, weight = (lower + 1).clamp(max=size - 1), source - lower
    window = max(int((upper[:, -1] - lower[:, 0]).max()) + 1, min(2, size))
    first = lower[:, :1].clamp(max=size - window)  # (T, 1)
    matrices = torch.zeros(len(positions), window, positions.shape[1], dtype=torch.float32, device="cpu")
    matrices.scatter_(1, (lower - first)[:, None], (1 - weight)[:, None])
    matrices.scatter_add_(1, (upper - first)[:, None], weight[:, None])
    return first + torch.arange(window, device="cpu"), matrices


# ---- padding ----


def pad(pixels: Tensor, padded_size: tuple[int, int], fill: int = 0) -> Tensor:
    """(..., H, W) -> (..., *padded_size), filled at the bottom and right.

    Args:
        pixels: of any type.
        padded_size: at least as large.
        fill: value of the padding.
    """
    padded, inside = padding(pixels.shape, padded_size, fill, dtype=pixels.dtype, device=pixels.device)
    inside.copy_(pixels)
    return padded


def padding(
    shape: Sequence[int], padded_size: tuple[int, int], fill: int = 0, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A tensor (..., *padded_size) that is `fill` at the bottom and right, and its inside `shape` (..., H, W), a view
    that holds anything: it is still to be written.

    Args:
        shape: of what will be inside.
        padded_size: height and width, at least as large.
        fill: value of the padding.
        dtype: of the result.
        device: of the result.
    """
    *channels, height, width = shape
    padded = torch.empty(*channels, *padded_size, dtype=dtype, device=device)
    padded[..., height:, :] = fill
    padded[..., :height, width:] = fill
    return padded, padded[..., :height, :width]

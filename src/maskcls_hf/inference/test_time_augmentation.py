"""Multi-scale and flipped copies of an image, for semantic segmentation.

As in the paper's code (`mask_former/test_time_augmentation.py` and detectron2's `DatasetMapperTTA`): for each scale the
resized image, then its mirror image; the class scores of each copy, at the size of the original image and mirrored
back, are averaged, and the class with the highest mean wins. One difference: copies are made from the original image,
the paper's from the image that was already resized for testing at a single scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # its short edges on all data sets, divided by that of plain testing


def scaled_size(size: Any, image_size: tuple[int, int] | None, scale: float, largest: float) -> dict[str, int]:
    """`size` of the image processor for a copy at `scale`.

    Args:
        size: that of the image processor.
        image_size: height and width where images keep their size; None: `size` decides.
        scale: factor on the plain size.
        largest: of all scales; the longest edge is bounded by this times its own bound, as in the paper's configs.

    Examples:
        >>> scaled_size({"shortest_edge": 512, "longest_edge": 2048}, None, scale=0.5, largest=1.75)
        {'shortest_edge': 256, 'longest_edge': 3584}
    """
    if image_size is not None:
        height, width = (max(1, round(length * scale)) for length in image_size)
        return {"height": height, "width": width}
    scales = {"longest_edge": max(largest, 1.0)} if size.get("shortest_edge") else {}
    return {
        edge: max(1, round(length * scales.get(edge, scale)))
        for edge, length in dict(size).items()
        if length is not None
    }


def mean_scores(
    images: Sequence[Tensor],
    scores_of: Callable[[Sequence[Tensor], float], list[Tensor]],
    scales: Sequence[float],
    flip: bool,
) -> list[Tensor]:
    """Class scores of images, averaged over their copies: (K, H, W) each.

    Args:
        images: (3, H, W) each.
        scores_of: class scores (K, H, W) of images at a scale, at their own size.
        scales: of the copies.
        flip: of each scale a mirrored copy, too.
    """
    totals: list[Tensor] = []
    for scale in scales:
        for mirrored in (False, True) if flip else (False,):
            copies = [image.flip(-1) for image in images] if mirrored else images
            found = scores_of(copies, scale)
            found = [scores.flip(-1) for scores in found] if mirrored else found
            totals = [total.add_(scores) for total, scores in zip(totals, found, strict=True)] if totals else found
    return [total.div_(len(scales) * (1 + flip)) for total in totals]

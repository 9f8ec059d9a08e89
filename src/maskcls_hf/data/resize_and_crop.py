"""Resizing and random crops of an image together with its map of ids; all resampling is torchvision's.

Images are (3, H, W) `tv_tensors.Image`, maps (1, H, W) ids or (M, H, W) bool `tv_tensors.Mask`; sizes are
(height, width). Randomness is torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

Pair = tuple[tv_tensors.Image, tv_tensors.Mask]
TRIES = 10  # crops looked at for one that is acceptable, as in the paper's code


def resize(image: tv_tensors.Image, ids: tv_tensors.Mask, size: tuple[int, int]) -> Pair:
    """The image bilinear with antialias, each id as under the pixel's centre."""
    return F.resize(image, list(size), antialias=True), resize_ids(ids, size)


def resize_ids(ids: tv_tensors.Mask, size: tuple[int, int]) -> tv_tensors.Mask:
    pixels = ids.as_subclass(torch.Tensor)
    # torchvision resizes what is neither uint8 nor a float as float32, which has no ids above 2**24.
    exact = pixels.view(torch.uint8) if pixels.dtype in (torch.bool, torch.uint8) else pixels.double()
    resized = F.resize(exact, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(resized.to(pixels.dtype), like=ids)


def random_crop(
    image: tv_tensors.Image,
    ids: tv_tensors.Mask,
    size: Sequence[int],
    acceptable: Callable[[tv_tensors.Mask], bool] | None = None,
) -> Pair:
    """A window of `size`, on a side that is shorter all of it; the last of `TRIES` if none is acceptable."""
    full_height, full_width = image.shape[-2:]
    height, width = min(size[0], full_height), min(size[1], full_width)
    for _ in range(TRIES):
        top = int(torch.randint(full_height - height + 1, ()))
        left = int(torch.randint(full_width - width + 1, ()))
        window = F.crop(ids, top, left, height, width)
        if acceptable is None or acceptable(window):
            break
    return F.crop(image, top, left, height, width), window


def no_class_dominates(ids: tv_tensors.Mask, classes: dict[int, int | None] | None, void_id: int, limit: float) -> bool:
    """Whether there are two classes at least and none has `limit` or more of the labelled pixels.

    The rule of the paper's code (detectron2's random crop with a constraint on the area of categories).

    Args:
        classes: of the segments, as `instance_id_to_semantic_id`; None: `ids` are classes, void is `void_id`.
    """
    if ids.dtype == torch.bool:
        counts = dict(enumerate(ids.flatten(1).sum(1).tolist()))
    else:
        counts = dict(zip(*(values.tolist() for values in ids.unique(return_counts=True)), strict=True))
    areas: dict[int, int] = {}
    for segment, count in counts.items():
        label = (None if segment == void_id else segment) if classes is None else classes.get(segment)
        if count and label is not None and label >= 0:
            areas[label] = areas.get(label, 0) + count
    return len(areas) > 1 and max(areas.values()) < limit * sum(areas.values())


def shortest_edge_size(size: Sequence[int], short_edge: int, longest_edge: int | None) -> tuple[int, int]:
    """(height, width) with the given short edge, or a smaller one where the long edge would be too long."""
    scale = short_edge / min(size)
    if longest_edge is not None:
        scale = min(scale, longest_edge / max(size))
    return _scaled(size, scale)


def fitted_size(size: Sequence[int], box: Sequence[int], factor: float) -> tuple[int, int]:
    """The largest (height, width) of the same shape within `factor` times the box."""
    return _scaled(size, factor * min(box[0] / size[0], box[1] / size[1]))


def window_size(size: Sequence[int], target: Sequence[int], factor: float) -> tuple[int, int]:
    """The window of an image that becomes `target` when enlarged by `factor`, by more where it would not fit."""
    factor = max(factor, target[0] / size[0], target[1] / size[1])
    height, width = _scaled(target, 1 / factor)
    return min(height, size[0]), min(width, size[1])


def _scaled(size: Sequence[int], scale: float) -> tuple[int, int]:
    return max(1, math.floor(size[0] * scale + 0.5)), max(1, math.floor(size[1] * scale + 0.5))


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def one_of(values: Sequence[int]) -> int:
    return values[int(torch.randint(len(values), ()))]

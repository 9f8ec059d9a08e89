"""Segments of one image: areas, boxes, and what is left of them at training resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.image_utils import SizeDict

from ...models.mask_runs import MaskRuns
from ...models.resampling import resize_nearest, resized_size
from ..coco_records import is_number
from ..files import shown, unique_ids

TINY = 10  # pixels


@dataclass
class Segment:
    """
    Args:
        label: id of its class in the files.
        area: pixels.
        lost: it has no pixel at training resolution.
    """

    label: int
    area: int
    crowd: bool = False
    lost: bool = False


@dataclass
class ImageLabels:
    """
    Args:
        size: (height, width).
        void: unlabelled pixels.
        values: all values of a map, void and unknown ones too.
        palette: colour of each value of a palette file.
    """

    size: tuple[int, int]
    segments: list[Segment] = field(default_factory=list)
    void: int = 0
    values: set[int] = field(default_factory=set)
    palette: dict[int, tuple[int, ...]] = field(default_factory=dict)


class Blob(NamedTuple):
    """Pixels of one id; `box` is (left, top, width, height)."""

    area: int
    box: tuple[int, int, int, int]


def blobs(ids: np.ndarray) -> dict[int, Blob]:
    """Area and box of every id of a map (H, W), from its runs within rows."""
    if not ids.size:
        return {}
    values = ids.ravel()
    new = np.ones(values.size, dtype=bool)
    new[1:] = values[1:] != values[:-1]
    new[:: ids.shape[1]] = True
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=values.size)
    found, inverse = np.unique(values[starts], return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    first = np.searchsorted(inverse[order], np.arange(len(found)))
    rows, columns, lengths = starts[order] // ids.shape[1], starts[order] % ids.shape[1], lengths[order]
    areas = np.add.reduceat(lengths, first)
    left, top = np.minimum.reduceat(columns, first), np.minimum.reduceat(rows, first)
    width = np.maximum.reduceat(columns + lengths, first) - left
    height = np.maximum.reduceat(rows + 1, first) - top
    table = np.stack([areas, left, top, width, height], axis=1).tolist()
    return {i: Blob(row[0], tuple(row[1:])) for i, row in zip(found.tolist(), table, strict=True)}


def smaller_size(size: tuple[int, int], training_size: Mapping[str, int] | None) -> tuple[int, int] | None:
    """Size (height, width) after the image processor's resize; None where no pixel can get lost in it."""
    if training_size is None:
        return None
    new = resized_size(size, SizeDict(**training_size))
    return new if new[0] < size[0] or new[1] < size[1] else None


def vanished(ids: np.ndarray, training_size: Mapping[str, int] | None) -> set[int]:
    """Ids of a map (H, W) that have no pixel after the resize, by the nearest pixel as in the image processor."""
    height, width = ids.shape
    new = smaller_size((height, width), training_size)
    if new is None:
        return set()
    values = torch.from_numpy(np.ascontiguousarray(ids))
    return set(unique_ids(values)) - set(unique_ids(resize_nearest(values, new)))


def area_differs(given: Any, blob: Blob, slack: bool) -> bool:
    """Whether an area of a json is wrong. `slack`: it can be that of a polygon, not of its pixels."""
    _, _, width, height = blob.box
    tolerance = 0.1 * blob.area + width + height if slack else 0.5
    return not abs(float(given) - blob.area) <= tolerance


def box_differs(given: Any, blob: Blob, slack: bool) -> str | None:
    """What is wrong with a box of a json; None: nothing."""
    if not (isinstance(given, list) and len(given) == 4 and all(map(is_number, given))):
        return f"box {shown(given)}, not [left, top, width, height]"
    left, top, width, height = np.array(given, dtype=np.float64).tolist()
    tolerance = 3 + 0.05 * max(blob.box[2:]) if slack else 0.5
    own = np.array([blob.box[0], blob.box[1], blob.box[0] + blob.box[2], blob.box[1] + blob.box[3]])
    if (abs(np.array([left, top, left + width, top + height]) - own) <= tolerance).all():
        return None
    corners = (abs(np.array([left, top, width, height]) - own) <= tolerance).all()
    hint = ", so it is [left, top, right, bottom]" if corners else ""
    return f"box {[round(float(number), 1) for number in given]}, mask {list(blob.box)}{hint}"


def vanished_masks(masks: list[MaskRuns], size: tuple[int, int], training_size: Mapping[str, int] | None) -> list[bool]:
    """Which masks have no pixel after the resize."""
    new = smaller_size(size, training_size)
    if new is None:
        return [False] * len(masks)
    rows, columns = (resize_nearest(torch.arange(size[i]).view(-1, 1), (new[i], 1))[:, 0].numpy() for i in (0, 1))
    lost = []
    for mask in masks:
        left, top, width, height = mask.box
        inside = np.ix_(
            rows[(rows >= top) & (rows < top + height)] - top,
            columns[(columns >= left) & (columns < left + width)] - left,
        )
        samples = inside[0].size * inside[1].size
        # a mask that fills more of its box than the samples leave free has one of them: no need to draw it
        surely_kept = samples > width * height - mask.area
        lost.append(not surely_kept and not (samples and mask.window()[1][inside].any()))
    return lost

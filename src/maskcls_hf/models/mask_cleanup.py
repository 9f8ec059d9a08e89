"""What people expect of segments beyond the paper: no object twice, no small holes, no specks.

Holes and fragments are found on run lengths, which are far fewer than pixels. A fragment is a part of a segment that
touches no other part of it, not even at a corner; a hole is a part of no thing that touches one thing alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .run_lengths import MaskRuns, pairs_in_ranges, sparse_nonzero

CHUNK = 8  # masks of the whole image at once
Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside

# ---- no object twice ----


def distinct(
    labels: Sequence[int],
    areas: Sequence[int],
    boxes: Sequence[Box],
    window: Callable[[int, Box], NDArray[np.bool_]],
    max_mask_iou: float,
) -> list[int]:
    """Places of the masks, best first, that stay: with no better one of their class an IoU above `max_mask_iou`.

    Args:
        labels: class of each mask (n,).
        areas: of each mask (n,), in pixels.
        boxes: of each mask (n,); a box may be larger than its mask.
        max_mask_iou: from 0 to 1.
        window: a mask and a box -> its pixels there.
    """
    kept: list[int] = []
    for place, (label, area, box) in enumerate(zip(labels, areas, boxes, strict=True)):
        for better in kept:
            if labels[better] != label or min(area, areas[better]) <= max_mask_iou * max(area, areas[better]):
                continue
            top, left, bottom, right = (
                *map(max, box[:2], boxes[better][:2]),
                *map(min, box[2:], boxes[better][2:]),
            )
            if (bottom - top) * (right - left) <= max_mask_iou * area or bottom <= top:
                continue
            common = int((window(place, (top, left, bottom, right)) & window(better, (top, left, bottom, right))).sum())
            if common > max_mask_iou * (area + areas[better] - common):
                break
        else:
            kept.append(place)
    return kept


# ---- holes and fragments ----


class _RowRuns(NamedTuple):
    """Pixels of one value side by side, row after row, of one map or of several below one another. (R,) each.

    `starts` and `stops` are rows times a stride, plus columns; the stride leaves a gap between rows, and between maps
    there is an empty row.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    values: NDArray[np.int64]
    at_border: NDArray[np.bool_]
    stride: int

    @classmethod
    def of(cls, maps: Sequence[NDArray[Any]], values: Sequence[int] | None = None) -> "_RowRuns":
        """Of maps (H, W) whose values are 0 for none; where `values` are given, of masks whose pixels have these."""
        stride = max((pixels.shape[1] for pixels in maps), default=0) + 2
        parts: list[tuple[NDArray[Any], ...]] = []
        first_row = 0
        for number, pixels in enumerate(maps):
            height, width = pixels.shape
            flat = np.ascontiguousarray(pixels).reshape(-1)
            is_first = np.ones(flat.size, dtype=np.bool_)
            np.not_equal(flat[1:], flat[:-1], out=is_first[1:])
            is_first[::width] = True
            places = sparse_nonzero(is_first)
            rows, columns = np.divmod(places, width)
            ends = np.append(places[1:], flat.size) - rows * width
            found = flat[places].astype(np.int64)
            if values is not None:
                found *= values[number]
            border = (columns == 0) | (ends == width) | (rows == 0) | (rows == height - 1)
            begin = (rows + first_row) * stride
            parts.append((begin + columns, begin + ends, found, border))
            first_row += height + 1
        starts, stops, found, border = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cls(starts, stops, found, border, stride)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.stops - self.starts

    def contacts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Runs (P,), and those that they touch in the next row or to their right; segments touch at corners too."""
        corner = self.values > 0
        first = np.searchsorted(self.stops, self.starts + self.stride - corner, side="right")
        end = np.searchsorted(self.starts, self.stops + self.stride + corner, side="left")
        ones, others = pairs_in_ranges(first, end)
        beside = np.flatnonzero(self.starts[1:] == self.stops[:-1])
        return np.concatenate([ones, beside]), np.concatenate([others, beside + 1])


class Parts:
    """Connected parts of equal value: of each run the number of the first run of its part (R,)."""

    def __init__(self, runs: _RowRuns):
        self.runs, self.contacts = runs, runs.contacts()
        same = runs.values[self.contacts[0]] == runs.values[self.contacts[1]]
        ones, others = (ends[same] for ends in self.contacts)
        self.of_run = np.arange(len(runs.values))
        while True:
            first, second = self.of_run[ones], self.of_run[others]
            differ = first != second
            if not differ.any():
                break
            ones, others, first, second = ones[differ], others[differ], first[differ], second[differ]
            self.of_run[np.maximum(first, second)] = np.minimum(first, second)  # always a lower one: no circles
            while not np.array_equal(above := self.of_run[self.of_run], self.of_run):
                self.of_run = above
        self.areas = np.bincount(self.of_run, runs.lengths, len(runs.values))
        self.totals = np.bincount(runs.values, runs.lengths)

    def fragments(self, min_share: float, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Runs of parts below `min_share` of the area of their segment; never those of its largest part.

        Args:
            min_share: from 0 to 1.
            kept: (V,) of the values, those that keep all of their parts.
        """
        values = self.runs.values
        firsts = np.flatnonzero(self.areas)
        of_part = values[firsts]
        largest = np.zeros(len(self.totals))
        np.maximum.at(largest, of_part, self.areas[firsts])
        is_small = (self.areas < min_share * self.totals[values]) & (self.areas < largest[values])
        is_small &= (values > 0) & ~kept[values]
        return is_small[self.of_run]

    def holes(self, max_share: float) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Runs of holes of at most `max_share` of the area of the segment around them, and its value (R,)."""
        values = self.runs.values
        ones, others = np.concatenate(self.contacts), np.concatenate(self.contacts[::-1])
        touch = (values[ones] == 0) & (values[others] > 0)
        places, neighbors = self.of_run[ones[touch]], values[others[touch]]
        lowest, highest = np.full(len(values), np.iinfo(np.int64).max), np.zeros(len(values), dtype=np.int64)
        np.minimum.at(lowest, places, neighbors)
        np.maximum.at(highest, places, neighbors)
        is_hole = lowest == highest
        is_hole[self.of_run[self.runs.at_border & (values == 0)]] = False
        is_hole &= self.areas <= max_share * self.totals[np.where(is_hole, highest, 0)]
        return is_hole[self.of_run], highest[self.of_run]


def _clean_runs(runs: _RowRuns, max_hole_share: float, min_fragment_share: float, stuff: NDArray[np.bool_]) -> _RowRuns:
    """Without small fragments, then without small holes.

    Args:
        runs: of one map or several.
        max_hole_share: from 0 to 1; 0: holes stay.
        min_fragment_share: from 0 to 1; 0: fragments stay.
        stuff: (V,) of the values, those that stay as they are, but in the holes of others.
    """
    if min_fragment_share > 0 and (is_fragment := Parts(runs).fragments(min_fragment_share, stuff)).any():
        runs = runs._replace(values=np.where(is_fragment, 0, runs.values))
    if max_hole_share > 0:
        things = runs._replace(values=np.where(stuff[runs.values], 0, runs.values))
        is_hole, around = Parts(things).holes(max_hole_share)
        runs = runs._replace(values=np.where(is_hole, around, runs.values))
    return runs


def clean_map(
    segmentation: Tensor, segments_info: list[dict[str, Any]], max_hole_share: float, min_fragment_share: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    """A panoptic map (H, W), its ids from 1 and 0 for none, and its records, with their areas.

    Stuff, what is fused, keeps its fragments and its holes: it may lie anywhere, and a hole that is small beside it may
    be a thing that was missed. In the holes of things it counts as nothing.

    Args:
        segmentation: (H, W), integers.
        segments_info: records as of `panoptic_segments`.
        max_hole_share: largest hole that is filled, as a part of the area of the thing around it.
        min_fragment_share: smallest fragment that stays, as a part of the area of its segment.

    Returns:
        Map and records. Where nothing changes they are those that were given.
    """
    if not segments_info or not (max_hole_share or min_fragment_share):
        return segmentation, segments_info
    pixels = segmentation.cpu().numpy()
    runs = _RowRuns.of([pixels])
    kept = np.zeros(max(info["id"] for info in segments_info) + 1, dtype=np.bool_)
    kept[[info["id"] for info in segments_info if info["was_fused"]]] = True
    cleaned = _clean_runs(runs, max_hole_share, min_fragment_share, kept)
    if np.array_equal(cleaned.values, runs.values):
        return segmentation, segments_info
    areas = np.bincount(cleaned.values, cleaned.lengths, len(kept)).astype(np.int64).tolist()
    pixels = np.repeat(cleaned.values.astype(pixels.dtype), cleaned.lengths).reshape(pixels.shape)
    cleaned_info = [info | {"area": areas[info["id"]]} for info in segments_info]
    return torch.from_numpy(pixels).to(segmentation.device), cleaned_info


def clean_windows(
    windows: Sequence[NDArray[np.bool_]], max_hole_share: float, min_fragment_share: float
) -> dict[int, int]:
    """Change masks, each in a window (h, w) that holds all of it, in place.

    Args:
        windows: bool, written to.
        max_hole_share: largest hole that is filled, as a part of the area of the mask.
        min_fragment_share: smallest fragment that stays, as a part of the area of the mask.

    Returns:
        place -> area of those that changed.
    """
    if not windows or not (max_hole_share or min_fragment_share):
        return {}
    runs = _RowRuns.of(windows, range(1, len(windows) + 1))
    kept = np.zeros(len(windows) + 1, dtype=np.bool_)
    cleaned = _clean_runs(runs, max_hole_share, min_fragment_share, kept)
    changed = np.flatnonzero(cleaned.values != runs.values)
    numbers = np.unique(np.maximum(cleaned.values, runs.values)[changed])
    ends = np.cumsum([0, *(len(window) + 1 for window in windows)]) * runs.stride  # first row of each window
    areas: dict[int, int] = {}
    for place in (numbers - 1).tolist():
        first, last = np.searchsorted(runs.starts, ends[[place, place + 1]])
        is_inside, lengths = cleaned.values[first:last] > 0, cleaned.lengths[first:last]
        windows[place][...] = np.repeat(is_inside, lengths).reshape(windows[place].shape)
        areas[place] = int(lengths[is_inside].sum())
    return areas


def clean_masks(
    masks: Sequence[MaskRuns], segments_info: list[dict[str, Any]], max_hole_share: float, min_fragment_share: float
) -> tuple[list[MaskRuns], list[dict[str, Any]]]:
    """Masks of one image, and their records with their areas.

    Args:
        masks: of the image, which may overlap.
        segments_info: a record with `area` for each.
        max_hole_share: largest hole that is filled, as a part of the area of the mask.
        min_fragment_share: smallest fragment that stays, as a part of the area of the mask.

    Returns:
        New lists of both.
    """
    places = [place for place, mask in enumerate(masks) if mask.area]
    windows = [masks[place].window() for place in places]
    changed = clean_windows([inside for _, inside in windows], max_hole_share, min_fragment_share)
    masks, segments_info = list(masks), list(segments_info)
    for number, area in changed.items():
        (rows, columns), inside = windows[number]
        place = places[number]
        (masks[place],) = MaskRuns.of_masks(inside[None], masks[place].size, rows.start, columns.start)
        segments_info[place] = segments_info[place] | {"area": area}
    return masks, segments_info


# ---- instances ----


def clean_instances(
    maps: Any,
    mask_logits: Tensor,
    mask_logit: float,
    labels: Sequence[int],
    areas: Sequence[int],
    *,
    max_mask_iou: float,
    max_hole_share: float,
    min_fragment_share: float,
    as_map: bool,
) -> tuple[Tensor, list[int], list[int]]:
    """Masks of instances, best first, without duplicates, small fragments and small holes.

    Args:
        mask_logit: what is above it is inside.
        labels: class of each mask (n,).
        areas: of each mask (n,), in pixels.
        max_mask_iou: of two masks of one class with an IoU above this the better stays.
        max_hole_share: largest hole that is filled, as a part of the area of the mask.
        min_fragment_share: smallest fragment that stays, as a part of the area of the mask.
        maps: makes the masks (`PlainMaps` or what does its work).
        mask_logits: (n, h, w).
        as_map: a map of the first mask at each pixel, from 1, instead of the masks.

    Returns:
        The masks that stay (m, H, W) bool, or the map (H, W) int32; their places (m,) among all; their areas (m,).
    """
    size, device = maps.sizes.target, mask_logits.device
    boxes = mask_boxes(mask_logits, mask_logit, maps.sizes)
    masks = None if as_map else maps.masks(mask_logits, mask_logit)
    windows: list[NDArray[np.bool_]] = []
    for first in range(0, len(boxes), CHUNK):  # one transfer each
        chunk = boxes[first : first + CHUNK]
        if masks is None:
            found = maps.masks(mask_logits[first : first + CHUNK], mask_logit)
        else:
            found = masks[first : first + CHUNK]
        inside = [mask[top:bottom, left:right] for mask, (top, left, bottom, right) in zip(found, chunk, strict=True)]
        flat = torch.cat([window.flatten() for window in inside]).cpu().numpy()
        parts = np.split(flat, np.cumsum([window.numel() for window in inside])[:-1])
        windows += [part.reshape(window.shape) for part, window in zip(parts, inside, strict=True)]

    def window(place: int, box: Box) -> NDArray[np.bool_]:
        (top, left), own = box[:2], boxes[place]
        return windows[place][top - own[0] : box[2] - own[0], left - own[1] : box[3] - own[1]]

    kept = distinct(labels, areas, boxes, window, max_mask_iou)
    windows, boxes = [windows[place] for place in kept], [boxes[place] for place in kept]
    new_areas = clean_windows(windows, max_hole_share, min_fragment_share)
    areas = [new_areas.get(place, areas[before]) for place, before in enumerate(kept)]
    if masks is None:
        ids = np.zeros(size, dtype=np.int32)
        for place in reversed(range(len(kept))):
            top, left, bottom, right = boxes[place]
            ids[top:bottom, left:right][windows[place]] = place + 1
        return torch.from_numpy(ids).to(device), kept, areas
    masks = masks if len(kept) == len(masks) else masks[kept]
    for place in new_areas:
        top, left, bottom, right = boxes[place]
        masks[place, top:bottom, left:right] = torch.from_numpy(windows[place]).to(device)
    return masks, kept, areas


def mask_boxes(mask_logits: Tensor, mask_logit: float, sizes: Any) -> list[Box]:
    """Boxes in the target map that hold all of each mask (n, h, w): bilinear resizing reaches one cell further.

    Args:
        mask_logits: (n, h, w), at the size of the network's output.
        mask_logit: what is above it is inside.
        sizes: a `ResizeGeometry`.

    Returns:
        (top, left, bottom, right) of each, in pixels.
    """
    inside = mask_logits > mask_logit
    ends = []
    for dim, cells in ((2, inside.shape[1]), (1, inside.shape[2])):
        there = inside.any(dim).cpu().numpy()  # (n, cells)
        padded, valid, target = (size[2 - dim] for size in (sizes.padded, sizes.valid, sizes.target))
        first, last = there.argmax(1), cells - 1 - there[:, ::-1].argmax(1)
        seen = [(first - 1) * padded / cells - 1, (last + 2) * padded / cells + 1]
        low, high = (edge * target / valid for edge in seen)
        ends += [np.floor(low - 1).clip(0, target), np.ceil(high + 1).clip(0, target)]
    top, bottom, left, right = (edge.astype(int).tolist() for edge in ends)
    return list(zip(top, left, bottom, right, strict=True))

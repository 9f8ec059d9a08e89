"""Masks as runs, so that many instances of a large image fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor


@dataclass(frozen=True)
class MaskRuns:
    """One mask of an image, as its runs down the columns, in the order of COCO's run-length encoding.

    Args:
        size: height and width (H, W) of the image.
        starts, stops: (R,) int64, sorted, where each run begins and ends: places x H + y of the image read column by
            column. A run does not cross columns.
    """

    size: tuple[int, int]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def of_masks(
        cls, masks: Tensor | NDArray[np.bool_], size: tuple[int, int] | None = None, top: int = 0, left: int = 0
    ) -> list[MaskRuns]:
        """Masks (n, h, w) whose first pixel is (`top`, `left`) of an image of `size`; None: the masks are the image."""
        pixels = masks.cpu().numpy() if isinstance(masks, Tensor) else masks
        size = size or (pixels.shape[1], pixels.shape[2])
        found = []
        for mask in pixels:
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            first_row, first_column = (int(there[0]) if len(there) else 0 for there in (rows, columns))
            inside = mask[first_row : rows.max(initial=-1) + 1, first_column : columns.max(initial=-1) + 1]
            edges = np.diff(np.pad(inside.T, ((0, 0), (1, 1))).view(np.int8))  # (w, h + 1)
            x, y = np.nonzero(edges == 1)
            _, end = np.nonzero(edges == -1)  # in the same order: starts and ends alternate in a column
            offset = (x + left + first_column) * size[0] + top + first_row
            found.append(cls(size, offset + y, offset + end))
        return found

    @classmethod
    def of_places(cls, places: NDArray[np.integer], number: int) -> list[MaskRuns]:
        """The masks of places 0..number-1 of a map (H, W); pixels of other values are in none."""
        height, width = places.shape
        columns = np.ascontiguousarray(places.T)
        is_first = np.ones((width, height), dtype=bool)
        np.not_equal(columns[:, 1:], columns[:, :-1], out=is_first[:, 1:])
        starts = np.flatnonzero(is_first)
        stops, values = np.append(starts[1:], columns.size), columns.reshape(-1)[starts]
        order = np.argsort(values, kind="stable")
        ends = np.searchsorted(values[order], np.arange(number + 1))
        parts = [order[first:last] for first, last in pairwise(ends)]
        return [cls((height, width), starts[part], stops[part]) for part in parts]

    @classmethod
    def of_rle(cls, record: Mapping[str, Any]) -> MaskRuns:
        """Of COCO's compressed run-length encoding, which is not broken; see `rle_counts`."""
        height, width = record["size"]
        edges = rle_counts(record["counts"]).cumsum()
        stops = edges[1::2]
        starts = edges[::2][: len(stops)]
        starts, stops = starts[starts < stops], stops[starts < stops]
        first, columns = starts // height, (stops - 1) // height - starts // height + 1
        ends = columns.cumsum()
        x = np.repeat(first - (ends - columns), columns) + np.arange(columns.sum())
        starts, stops = np.repeat(starts, columns), np.repeat(stops, columns)
        return cls((height, width), np.maximum(starts, x * height), np.minimum(stops, (x + 1) * height))

    @classmethod
    def union(cls, masks: Sequence[MaskRuns]) -> MaskRuns:
        """Of masks of one image, at least one."""
        starts, stops = (np.concatenate([getattr(mask, name) for mask in masks]) for name in ("starts", "stops"))
        order = starts.argsort(kind="stable")
        starts, stops = starts[order], np.maximum.accumulate(stops[order])
        size = masks[0].size
        begins = np.ones(len(starts), dtype=bool)  # where no earlier run reaches
        begins[1:] = (starts[1:] > stops[:-1]) | (starts[1:] % size[0] == 0) & (starts[1:] == stops[:-1])
        return cls(size, starts[begins], stops[np.roll(begins, -1)])

    @cached_property
    def area(self) -> int:
        """Pixels."""
        return int((self.stops - self.starts).sum())

    @cached_property
    def box(self) -> list[int]:
        """Smallest box: left, top, width, height; of an empty mask all 0."""
        if not len(self.starts):
            return [0, 0, 0, 0]
        height = self.size[0]
        left, right = int(self.starts[0] // height), int(self.starts[-1] // height)
        top, bottom = int((self.starts % height).min()), int(((self.stops - 1) % height).max())
        return [left, top, right - left + 1, bottom - top + 1]

    def window(self) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
        """Where the box lies in a map (H, W), and the mask in it."""
        left, top, width, height = self.box
        edges = np.zeros(width * height + 1, dtype=np.int8)
        for change, places in ((1, self.starts), (-1, self.stops - 1)):
            x, y = np.divmod(places, self.size[0])
            edges[(x - left) * height + y - top + (change < 0)] += change
        inside = edges[:-1].cumsum(dtype=np.int8).view(bool).reshape(width, height).T
        return np.s_[top : top + height, left : left + width], inside

    def dense(self) -> NDArray[np.bool_]:
        """(H, W)."""
        pixels = np.zeros(self.size, dtype=bool)
        self.paint(pixels, True)
        return pixels

    def paint(self, pixels: NDArray[Any], value: Any) -> None:
        """Set the pixels of the mask in a map (H, W) of the image."""
        height = self.size[0]
        columns, first = np.divmod(self.starts, height)
        for x, top, bottom in zip(
            columns.tolist(), first.tolist(), (self.stops - columns * height).tolist(), strict=True
        ):
            pixels[top:bottom, x] = value

    def rle(self) -> dict[str, Any]:
        """COCO's compressed run-length encoding: {"size": [H, W], "counts": str}."""
        height, width = self.size
        begins = np.ones(len(self.starts), dtype=bool)
        begins[1:] = self.starts[1:] != self.stops[:-1]  # in this encoding runs go on in the next column
        edges = np.stack([self.starts[begins], self.stops[np.roll(begins, -1)]], axis=1)
        places = edges.reshape(-1)
        if not len(places) or places[-1] < height * width:
            places = np.append(places, height * width)
        counts = np.diff(places, prepend=0)
        record = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        return {"size": [height, width], "counts": record["counts"].decode("ascii")}


def rle_counts(counts: bytes | str) -> NDArray[np.int64]:
    """Lengths of the runs of a compressed run-length encoding, which pycocotools does not check.

    Each number is written in digits of 5 bits, lowest first, as characters from "0" on; 32 says that more digits
    follow, 16 in the last one that it is negative. From the fourth number on it is the difference to the last but one.

    Raises:
        ValueError: they are broken.
    """
    packed = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    digits = np.frombuffer(packed, dtype=np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("no run lengths")
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 30:
        raise ValueError("no run lengths")
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, 1 << shifts[ends] + 5, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    if runs.min() < 0:
        raise ValueError("no run lengths")
    return runs

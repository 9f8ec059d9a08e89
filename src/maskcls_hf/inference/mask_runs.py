"""Masks as runs, so that many instances of a large image fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
            edges = np.diff(np.pad(mask.T, ((0, 0), (1, 1))).view(np.int8))  # (w, h + 1)
            x, y = np.nonzero(edges == 1)
            _, end = np.nonzero(edges == -1)  # in the same order: starts and ends alternate in a column
            offset = (x + left) * size[0] + top
            found.append(cls(size, offset + y, offset + end))
        return found

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

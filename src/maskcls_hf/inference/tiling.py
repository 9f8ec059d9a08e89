"""Where the tiles of an image lie, which of them answers for a pixel, and in what order they are visited."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """Place of a tile in its grid.

    Attributes:
        row: from 0.
        column: from 0.
        lead_in: visited again, for what it adds to the blend with its right neighbor.
    """

    row: int
    column: int
    lead_in: bool = False


class TileAxis:
    """Tiles along one axis: of one length, evenly spread, neighbors sharing at least `overlap` of it.

    Args:
        length: of the image, in pixels.
        tile: length of a tile; shorter images are one tile of their own length.
        overlap: part of a tile.

    Attributes:
        starts: first pixel of each tile.
        size: pixels of a tile.
        seams: for each tile but the last, the pixel from which the next one answers: the middle of what they share.
        ramps: for each tile but the last, (first, end) of the pixels in which it blends with the next one: `overlap`
            pixels around the seam, fewer where seams are closer than that.

    Examples:
        >>> axis = TileAxis(200, 128, 0.25)
        >>> axis.starts, axis.seams
        ([0, 72], [100])
    """

    def __init__(self, length: int, tile: int, overlap: float):
        shared = math.ceil(tile * overlap)
        self.length, self.size = length, min(tile, length)
        count = 1 if length <= tile else math.ceil((length - tile) / (tile - shared)) + 1
        self.starts = [round(i * (length - self.size) / max(count - 1, 1)) for i in range(count)]
        self.seams = [(start + before + self.size) // 2 for before, start in pairwise(self.starts)]
        ramp = min([shared, *(after - before for before, after in pairwise(self.seams))])
        self.ramps = [(seam - ramp // 2, seam - ramp // 2 + ramp) for seam in self.seams]

    def __len__(self) -> int:
        return len(self.starts)

    def window(self, index: int) -> slice:
        """Pixels of a tile."""
        return slice(self.starts[index], self.starts[index] + self.size)

    def cell(self, index: int) -> slice:
        """Pixels that a tile answers for, up to its seams."""
        bounds = [0, *self.seams, self.length]
        return slice(bounds[index], bounds[index + 1])

    def reach(self, index: int) -> slice:
        """Pixels of a tile that count in a blend: up to the far ends of its ramps."""
        first = self.ramps[index - 1][0] if index > 0 else 0
        return slice(first, self.ramps[index][1] if index < len(self.ramps) else self.length)

    def shared(self, index: int) -> slice:
        """Pixels that tile `index` shares with the one before."""
        return slice(self.starts[index], max(self.starts[index - 1] + self.size, self.starts[index]))


class TileGrid:
    """Tiles of an image.

    Args:
        size: (height, width) of the image.
        tile: side of a tile in pixels.
        overlap: part of a tile that it shares with the next one at least.

    Raises:
        ValueError: a tile below 16 pixels, an overlap outside 0..0.5.

    Examples:
        >>> grid = TileGrid((200, 100), tile=128, overlap=0.25)
        >>> [(tile.row, tile.column) for tile in grid.visits()]
        [(0, 0), (1, 0)]
    """

    def __init__(self, size: tuple[int, int], tile: int, overlap: float):
        check_tile(tile, overlap)
        self.size = size
        self.rows, self.columns = (TileAxis(length, tile, overlap) for length in size)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def crop(self, image: Tensor, tile: Tile) -> Tensor:
        """(..., H, W) -> (..., h, w), a view."""
        return image[..., self.rows.window(tile.row), self.columns.window(tile.column)]

    def visits(self, columns_at_once: int | None = None) -> Iterator[Tile]:
        """All tiles in bands of `columns_at_once` columns, each band row by row.

        A band begins with the last column of the band before, as lead-in.
        """
        width = columns_at_once or len(self.columns)
        for first in range(0, len(self.columns), width):
            for row in range(len(self.rows)):
                if first:
                    yield Tile(row, first - 1, lead_in=True)
                for column in range(first, min(first + width, len(self.columns))):
                    yield Tile(row, column)


def check_tile(tile: int, overlap: float) -> None:
    """Refuses tiles that are too small, or overlap too much.

    Raises:
        ValueError: a tile below 16 pixels, an overlap outside 0..0.5.
    """
    if not tile >= 16:  # nor NaN
        raise ValueError(f"tile must be at least 16 pixels, got {tile}.")
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap must be a part of the tile from 0 to 0.5, got {overlap}.")


def relative(window: slice, to: slice) -> slice:
    """`window` counted from the start of `to`."""
    return slice(window.start - to.start, window.stop - to.start)

"""Logits of one image -> its map: upsample to the padded size, crop the padding, resize to the target.

Both resizes are bilinear with half-pixel centres (`align_corners=False`). A map is made in tiles: a tile needs a small
window of the logits, so what is computed for it stays in a core's cache, whatever the size of the map. Sizes are
(height, width).
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Size = Sequence[int] | Tensor  # (height, width); (2,)

TILE = 64  # padded pixels along a tile's edge on a CPU: 100 masks of it about fit a core's cache
LARGEST_TILE = 256  # target pixels along a tile's edge
DEVICE_VALUES = 2**28  # on other devices: values of a tile, all channels; few large tiles keep them busy


class Interpolation(NamedTuple):
    """Some output positions of one axis, each between two positions of a window of the input."""

    window: slice
    taps: tuple[Tensor, Tensor, Tensor] | None = None  # lower and upper position in the window, weight of the upper
    matrix: Tensor | None = None  # (n, window), the same; on a CPU, where a product is faster than gathering

    @classmethod
    def between(cls, size: int, out_size: int, positions: slice, device: torch.device) -> "Interpolation":
        """How `positions` of an axis of `out_size` follow from one of `size`; where sizes are equal, they are it."""
        if size == out_size:
            return cls(positions)
        centres = torch.arange(positions.start, positions.stop, dtype=torch.float32, device="cpu") + 0.5
        source = (centres * (size / out_size) - 0.5).clamp(min=0, max=size - 1)
        lower = source.long()
        upper, weight = (lower + 1).clamp(max=size - 1), source - lower
        window = slice(int(lower[0]), int(upper[-1]) + 1)
        lower, upper = lower - window.start, upper - window.start
        if device.type != "cpu":
            return cls(window, taps=(lower.to(device), upper.to(device), weight.to(device)))
        matrix = torch.zeros(len(weight), window.stop - window.start, dtype=torch.float32, device="cpu")
        matrix.scatter_(1, lower[:, None], 1 - weight[:, None])
        matrix.scatter_add_(1, upper[:, None], weight[:, None])
        return cls(window, matrix=matrix)

    def along(self, dim: int, maps: Tensor) -> Tensor:
        """`dim` 1 or 2 of maps (C, y, x), which hold the window of it."""
        if self.matrix is not None:
            return self.matrix @ maps if dim == 1 else maps @ self.matrix.T
        if self.taps is None:
            return maps
        lower, upper, weight = self.taps
        weight = weight[:, None] if dim == 1 else weight
        return torch.lerp(maps.index_select(dim, lower), maps.index_select(dim, upper), weight)


class TileAxis(NamedTuple):
    """Rows or columns of a tile."""

    target: slice
    to_padded: Interpolation  # from the logits
    to_target: Interpolation  # from the padded size

    @property
    def source(self) -> slice:
        """Rows or columns of the logits that the tile depends on."""
        return self.to_padded.window

    def __len__(self) -> int:
        return self.target.stop - self.target.start


class Tile(NamedTuple):
    """A rectangle of the target."""

    rows: TileAxis
    columns: TileAxis

    @property
    def target(self) -> tuple[slice, slice]:
        return self.rows.target, self.columns.target

    @property
    def area(self) -> int:
        return len(self.rows) * len(self.columns)

    def window(self, maps: Tensor) -> Tensor:
        """Those cells of maps of the whole image (C, h, w) that the tile depends on: (C, y, x)."""
        return maps[:, self.rows.source, self.columns.source]

    def at_padded_size(self, window: Tensor) -> Tensor:
        """The window of the tile, at those padded pixels that it depends on (C, y, x)."""
        return self.columns.to_padded.along(2, self.rows.to_padded.along(1, window))

    def at_target_size(self, maps: Tensor) -> Tensor:
        """What `at_padded_size` gave (or was made of it), at the pixels of the tile (C, H, W)."""
        return self.columns.to_target.along(2, self.rows.to_target.along(1, maps))


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a target, row by row."""

    rows: list[TileAxis]
    columns: list[TileAxis]

    def __iter__(self) -> Iterator[Tile]:
        return (tile for rows in self.rows for tile in self.in_row(rows))

    def in_row(self, rows: TileAxis) -> list[Tile]:
        return [Tile(rows, columns) for columns in self.columns]

    def extremes(self, extreme: Callable[[Tensor, int], Tensor], bounds: Tensor) -> Tensor:
        """`torch.amin` or `torch.amax` in each tile of a row (C, T), of the bounds (C, y, x) that `corner_bounds` makes
        of the cells that the row depends on."""
        of_columns = extreme(bounds, 1)
        of_tiles = []
        for axis in self.columns:
            first = min(axis.source.start, of_columns.shape[1] - 1)
            of_tiles.append(extreme(of_columns[:, first : max(first + 1, axis.source.stop - 1)], 1))
        return torch.stack(of_tiles, 1)


@dataclass(frozen=True)
class MapFrame:
    """The sizes that a map passes through."""

    logits: tuple[int, int]
    padded: tuple[int, int]
    valid: tuple[int, int]  # the image; padding lies at the bottom and the right
    target: tuple[int, int]

    @classmethod
    def checked(cls, logits: Tensor, padded_size: Size, valid_size: Size, target_size: Size) -> "MapFrame":
        """Raises TypeError or ValueError for what is no size, and for an image larger than its padded size."""
        padded = _checked_size(padded_size, "padded_size")
        valid = _checked_size(valid_size, "valid_size")
        target = _checked_size(target_size, "target_size")
        if valid[0] > padded[0] or valid[1] > padded[1]:
            raise ValueError(f"valid_size {valid} does not fit into padded_size {padded}; both are (height, width)")
        return cls((logits.shape[-2], logits.shape[-1]), padded, valid, target)

    def tiles(self, channels: int, device: torch.device) -> TileGrid:
        """`channels`: how many maps are held of a tile."""
        if device.type == "cpu":
            edges = [TILE * target // valid for target, valid in zip(self.target, self.valid, strict=True)]
            edges = [min(max(edge, 1), LARGEST_TILE) for edge in edges]
        else:
            values_of_row = channels * max(self.target[1], self.valid[1]) * max(1, self.valid[0] / self.target[0])
            edges = [max(1, int(DEVICE_VALUES / max(values_of_row, 1))), self.target[1]]
        return TileGrid(*(self._tile_axes(axis, edge, device) for axis, edge in enumerate(edges)))

    def _tile_axes(self, axis: int, edge: int, device: torch.device) -> list[TileAxis]:
        tiles = []
        for start in range(0, self.target[axis], edge):
            target = slice(start, min(start + edge, self.target[axis]))
            to_target = Interpolation.between(self.valid[axis], self.target[axis], target, device)
            to_padded = Interpolation.between(self.logits[axis], self.padded[axis], to_target.window, device)
            tiles.append(TileAxis(target, to_padded, to_target))
        return tiles


def _checked_size(size: Size, name: str) -> tuple[int, int]:
    try:
        values = tuple(operator.index(value) for value in size)
    except TypeError as error:
        raise TypeError(f"{name} must be (height, width), two integers, got {size!r}") from error
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{name} must be (height, width), two positive integers, got {values}")
    return values[0], values[1]

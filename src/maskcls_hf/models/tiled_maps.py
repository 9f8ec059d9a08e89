"""The maps of post_processing.py on a CPU: in tiles, so that what is computed stays in a core's cache whatever the size
of the map, and in a tile only for the classes or queries that can win there.

Interpolation is convex: between some cells a score lies between its least and its greatest value at them. What nowhere
reaches the least value of another one cannot win.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .parallel import parallel_map
from .post_processing import PlainMaps, ResizeGeometry

TILE = 64  # padded pixels along a tile's edge: 100 masks of it about fit a core's cache
LARGEST_TILE = 256  # target pixels along a tile's edge


class TiledMaps(PlainMaps):
    """As `PlainMaps`; another class or query only where the best scores tie to the rounding of float32."""

    def semantic_map(self, class_probs: Tensor, mask_logits: Tensor, resize: str) -> Tensor:
        by_class = class_probs.T.contiguous()  # (K, N)

        def scores_of(logits: Tensor, classes: Tensor) -> Tensor:  # (N, y, x) -> (k, y, x)
            return (by_class[classes] @ logits.sigmoid().flatten(1)).unflatten(1, logits.shape[1:])

        return tiled_argmax(self.sizes, mask_logits, scores_of, len(by_class), resize)

    def per_pixel_map(self, logits: Tensor) -> Tensor:
        return tiled_argmax(self.sizes, logits, lambda maps, classes: maps[classes], len(logits), "scores")

    def assign_pixels(self, scores: Tensor, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor, Tensor]:
        winners = torch.empty(self.sizes.target, dtype=torch.int32, device="cpu")
        weights = scores[:, None, None]
        grid = TileGrid.of(self.sizes)

        def assign_row(rows: TileAxis) -> Tensor:
            """The areas (n,) of masks in a row of tiles."""
            bounds = cell_min_max(mask_logits[:, rows.source])
            can_win = (
                grid.extremes(torch.amax, max_margin(*(bound.sigmoid() * weights for bound in bounds))) >= 0
            )  # (n, T)
            least, most = grid.extremes(torch.amin, bounds[0]), grid.extremes(torch.amax, bounds[1])
            crossed = (least < mask_logit) & (most >= mask_logit)  # by the outline of a mask
            settled = ((can_win.sum(0) == 1) & ~crossed.any(0)).tolist()
            tiles = grid.in_row(rows)
            tile_areas = torch.tensor([tile.area for tile in tiles], device=least.device)
            areas = ((least >= mask_logit) * tile_areas).sum(1)  # of tiles without outline
            by_tile = zip(tiles, candidates_per_tile(can_win | crossed), settled, crossed.T, strict=True)
            for tile, queries, is_settled, is_crossed in by_tile:
                if is_settled:
                    winners[tile.target] = queries
                    continue
                logits = tile.to_padded_size(tile.window(mask_logits)[queries])
                left = candidates(*cell_min_max(logits.sigmoid() * weights[queries])) | is_crossed[queries]
                left = left.nonzero()[:, 0]
                queries, logits = queries[left], tile.to_target_size(logits[left])
                areas.index_add_(0, queries, (logits >= mask_logit).sum((1, 2)) * is_crossed[queries])
                write_argmax_(winners[tile.target], logits.sigmoid() * weights[queries], queries)
            return areas

        mask_areas = sum(parallel_map(assign_row, grid.rows), torch.zeros_like(scores, dtype=torch.int64))
        return winners, winners.flatten().bincount(minlength=len(scores)), mask_areas

    def mask_areas(self, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor]:
        areas = torch.zeros(len(mask_logits), dtype=torch.int64, device="cpu")
        prob_sums = torch.zeros(len(mask_logits), dtype=torch.float64, device="cpu")
        for _, present, logits in self._masks_in_tiles(mask_logits, mask_logit):
            inside = logits > mask_logit
            areas[present] += inside.sum((1, 2))
            prob_sums[present] += (logits.sigmoid() * inside).sum((1, 2))
        return areas, prob_sums

    def masks(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        # of numpy, pages that stay empty take neither memory nor time
        masks = torch.from_numpy(np.zeros((len(mask_logits), *self.sizes.target), dtype=bool))
        for tile, present, logits in self._masks_in_tiles(mask_logits, mask_logit):
            masks[present, tile.rows.target, tile.columns.target] = logits > mask_logit
        return masks

    def instance_map(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        ids = torch.zeros(self.sizes.target, dtype=torch.int32, device="cpu")
        for tile, present, logits in self._masks_in_tiles(mask_logits, mask_logit):
            inside, of_tile = logits > mask_logit, ids[tile.target]
            for index in reversed(range(len(present))):  # the first is written last
                of_tile.masked_fill_(inside[index], present[index] + 1)
        return ids

    def _masks_in_tiles(self, mask_logits: Tensor, mask_logit: float) -> Iterator[tuple["Tile", Tensor, Tensor]]:
        """Each tile where masks can have pixels, the indices of these masks (k,), and their logits in it (k, H, W)."""
        grid = TileGrid.of(self.sizes)
        for rows in grid.rows:
            _, most = cell_min_max(mask_logits[:, rows.source])
            is_present = grid.extremes(torch.amax, most) > mask_logit
            for tile, present in zip(grid.in_row(rows), candidates_per_tile(is_present), strict=True):
                if len(present):
                    yield tile, present, tile.to_target_size(tile.to_padded_size(tile.window(mask_logits)[present]))


def tiled_argmax(
    sizes: ResizeGeometry,
    maps: Tensor,
    scores_of: Callable[[Tensor, Tensor], Tensor],
    num_labels: int,
    resize: str,
) -> Tensor:
    """The class of the greatest score at each pixel (H, W) int64. `scores_of(maps, classes)` makes scores of `maps`;
    each grows with all of them."""
    segmentation = torch.empty(sizes.target, dtype=torch.int64, device="cpu")
    all_classes = torch.arange(num_labels, device="cpu")
    grid = TileGrid.of(sizes)

    def write_row(rows: TileAxis) -> None:
        least, most = (scores_of(bound, all_classes) for bound in cell_min_max(maps[:, rows.source]))
        can_win = grid.extremes(torch.amax, max_margin(least, most)) >= 0
        for tile, classes in zip(grid.in_row(rows), candidates_per_tile(can_win), strict=True):
            if len(classes) == 1:
                segmentation[tile.target] = classes
                continue
            logits = tile.to_padded_size(tile.window(maps))
            if resize == "scores":
                scores = scores_of(logits, classes)
                left = candidates(*cell_min_max(scores))
                scores, classes = tile.to_target_size(scores[left]), classes[left]
            else:
                classes = classes[candidates(*(scores_of(bound, classes) for bound in cell_min_max(logits)))]
                scores = scores_of(tile.to_target_size(logits), classes)
            write_argmax_(segmentation[tile.target], scores, classes)

    parallel_map(write_row, grid.rows)
    return segmentation


def candidates(least: Tensor, most: Tensor) -> Tensor:
    """Bounds of C scores at some places (C, y, x) -> (C,) bool: which can win at any of them."""
    return max_margin(least, most).flatten(1).amax(1) >= 0


def max_margin(least: Tensor, most: Tensor) -> Tensor:
    """Bounds of C scores at some places (C, y, x) -> how far each can be ahead there (C, y, x); below 0 it cannot win.

    Of floats torch finds the maximum over places faster than it compares them.
    """
    return most - least.amax(0)


def cell_min_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values at pixels (C, y, x) -> the least and the greatest of four neighbors (C, y - 1, x - 1): the bounds of what
    is interpolated between them. An axis with a single pixel stays as it is."""
    least = most = values
    for dim in (1, 2):
        if (pairs := values.shape[dim] - 1) > 0:
            least = torch.minimum(least.narrow(dim, 0, pairs), least.narrow(dim, 1, pairs))
            most = torch.maximum(most.narrow(dim, 0, pairs), most.narrow(dim, 1, pairs))
    return least, most


def candidates_per_tile(can_win: Tensor) -> tuple[Tensor, ...]:
    """(C, T) bool -> for each tile the indices of what can win there."""
    return can_win.T.nonzero()[:, 1].split(can_win.sum(0).tolist())


def write_argmax_(area: Tensor, scores: Tensor, names: Tensor) -> None:
    """Write into `area` (H, W) the name (k,) of the greatest score (k, H, W), the first where several are equal.

    torch's argmax over the first of several dimensions takes many times as long.
    """
    first, *others = names.tolist()
    area.fill_(first)
    best = scores[0]
    for name, score in zip(others, scores[1:], strict=True):
        area.masked_fill_(score > best, name)
        best = torch.maximum(best, score)


class Interpolation(NamedTuple):
    """Some output positions of one axis, each between two positions of a window of the input."""

    window: slice
    matrix: Tensor | None = None  # (n, window); None where the positions are the window

    @classmethod
    def between(cls, size: int, out_size: int, positions: slice) -> "Interpolation":
        """How `positions` of an axis of `out_size` follow from one of `size`."""
        if size == out_size:
            return cls(positions)
        centers = torch.arange(positions.start, positions.stop, dtype=torch.float32, device="cpu") + 0.5
        source = (centers * (size / out_size) - 0.5).clamp(min=0, max=size - 1)
        lower = source.long()
        upper, weight = (lower + 1).clamp(max=size - 1), source - lower
        window = slice(int(lower[0]), int(upper[-1]) + 1)
        matrix = torch.zeros(len(weight), window.stop - window.start, dtype=torch.float32, device="cpu")
        matrix.scatter_(1, lower[:, None] - window.start, 1 - weight[:, None])
        matrix.scatter_add_(1, upper[:, None] - window.start, weight[:, None])
        return cls(window, matrix)

    def along(self, dim: int, maps: Tensor) -> Tensor:
        """`dim` 1 or 2 of maps (C, y, x), which hold the window of it."""
        if self.matrix is None:
            return maps
        return self.matrix @ maps if dim == 1 else maps @ self.matrix.T


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

    def to_padded_size(self, window: Tensor) -> Tensor:
        """The window of the tile, at those padded pixels that it depends on (C, y, x)."""
        return self.columns.to_padded.along(2, self.rows.to_padded.along(1, window))

    def to_target_size(self, maps: Tensor) -> Tensor:
        """What `to_padded_size` gave (or was made of it), at the pixels of the tile (C, H, W)."""
        return self.columns.to_target.along(2, self.rows.to_target.along(1, maps))


class TileGrid(NamedTuple):
    """The tiles of a target, row by row."""

    rows: list[TileAxis]
    columns: list[TileAxis]

    @classmethod
    def of(cls, sizes: ResizeGeometry) -> "TileGrid":
        axes = []
        for logits, padded, valid, target in zip(sizes.logits, sizes.padded, sizes.valid, sizes.target, strict=True):
            edge = min(max(TILE * target // valid, 1), LARGEST_TILE)
            tiles = []
            for start in range(0, target, edge):
                pixels = slice(start, min(start + edge, target))
                to_target = Interpolation.between(valid, target, pixels)
                to_padded = Interpolation.between(logits, padded, to_target.window)
                tiles.append(TileAxis(pixels, to_padded, to_target))
            axes.append(tiles)
        return cls(*axes)

    def in_row(self, rows: TileAxis) -> list[Tile]:
        return [Tile(rows, columns) for columns in self.columns]

    def extremes(self, extreme: Callable[[Tensor, int], Tensor], bounds: Tensor) -> Tensor:
        """`torch.amin` or `torch.amax` in each tile of a row (C, T), of the bounds (C, y, x) that `cell_min_max` makes
        of the cells that the row depends on."""
        of_columns = extreme(bounds, 1)
        of_tiles = []
        for axis in self.columns:
            first = min(axis.source.start, of_columns.shape[1] - 1)
            of_tiles.append(extreme(of_columns[:, first : max(first + 1, axis.source.stop - 1)], 1))
        return torch.stack(of_tiles, 1)

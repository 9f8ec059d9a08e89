"""Results of overlapping tiles -> the result of the image, tile by tile.

Each stitcher takes the tiles in the order of `TileGrid.visits` (`add`) and gives the whole at the end (`result`). What
it holds besides the result are the strips that tiles share with neighbors still to come.

Segments of neighboring tiles are parts of one thing if they have one class and their masks inside the strip that both
tiles see have an IoU above 0.5. Each pixel takes its segment from the tile that answers for it: seams run in the middle
of the strips, so that what a tile sees only in part, at its border, does not count. A segment that one tile alone finds
is dropped if seams take more than half of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.post_processing import map_of_scores
from ..models.run_lengths import MaskRuns
from .tiling import Tile, TileAxis, TileGrid, relative

MIN_IOU = 0.5  # above it two segments of one tile cannot both match a third without overlapping themselves
MIN_PART = 0.5  # of a segment that one tile alone finds, the least part where that tile answers


class SemanticBlend:
    """Class scores, blended with weights that sum to one, and the class with the highest score; none where it is not
    above a `score_threshold` other than 0.

    Holds scores of the strips of one row of a band, (K, strip, band); see `TileGrid.visits`.
    """

    def __init__(self, grid: TileGrid, score_threshold: float = 0.0):
        self.grid, self.score_threshold = grid, score_threshold
        self.segmentation = torch.empty(grid.size, dtype=torch.int64, device="cpu")
        self.beside: Tensor | None = None  # weighted scores of the left neighbor, (K, reach, ramp)
        self.above: dict[int, Tensor] = {}  # of the upper neighbors, by column, (K, ramp, w)

    def add(self, tile: Tile, scores: Tensor) -> None:
        """`scores` (K, h, w) of a tile; they are changed."""
        rows, columns = self.grid.rows, self.grid.columns
        for dim, axis, index in ((1, rows, tile.row), (2, columns, tile.column)):
            reach = axis.reach(index)
            scores = scores.narrow(dim, reach.start - axis.starts[index], reach.stop - reach.start)
            _fade(scores, dim, axis, index)
        if self.beside is not None and tile.column and not tile.lead_in:
            scores[:, :, : self.beside.shape[2]] += self.beside
        finished_rows, finished_columns = self._finished(rows, tile.row), self._finished(columns, tile.column)
        width = finished_columns.stop - finished_columns.start
        self.beside = scores[:, :, width:].clone()
        if tile.lead_in:
            return
        scores = scores[:, :, :width]
        if tile.row:
            above = self.above.pop(tile.column)
            scores[:, : above.shape[1]] += above
        height = finished_rows.stop - finished_rows.start
        self.segmentation[finished_rows, finished_columns] = map_of_scores(
            scores[:, :height], self.score_threshold
        ).cpu()
        self.above[tile.column] = scores[:, height:].clone()

    @staticmethod
    def _finished(axis: TileAxis, index: int) -> slice:
        """Pixels to which the tiles after this one add nothing."""
        reach = axis.reach(index)
        return slice(reach.start, axis.ramps[index][0] if index < len(axis.ramps) else reach.stop)

    def result(self) -> Tensor:
        """Map of classes (H, W) int64."""
        return self.segmentation


def _fade(scores: Tensor, dim: int, axis: TileAxis, index: int) -> None:
    """Multiply (K, h, w) along `dim` by weights that fall toward the neighbors; with theirs they sum to one."""
    for ramp, falls in ((index - 1, False), (index, True)):
        if not 0 <= ramp < len(axis.ramps):
            continue
        width = axis.ramps[ramp][1] - axis.ramps[ramp][0]
        weights = (torch.arange(width, dtype=scores.dtype, device=scores.device) + 0.5) / width
        weights = 1 - weights if falls else weights
        part = scores.narrow(dim, scores.shape[dim] - width if falls else 0, width)
        part *= weights if dim == 2 else weights[:, None]


class Pieces:
    """Segments of single tiles, and which of them are one segment of the image (union-find).

    Pieces count from 1; 0 is no segment. `infos` are the records of the tiles, whose areas are those in the tile;
    `areas` are the pixels that a piece contributes.
    """

    def __init__(self) -> None:
        self.parents = [0]
        self.infos: list[dict[str, Any]] = [{}]
        self.areas = [0]

    def add(self, info: dict[str, Any], area: int) -> int:
        self.parents.append(len(self.parents))
        self.infos.append(info)
        self.areas.append(area)
        return len(self.parents) - 1

    def root(self, piece: int) -> int:
        while self.parents[piece] != piece:
            self.parents[piece] = piece = self.parents[self.parents[piece]]
        return piece

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self.parents[second] = first

    def join_matches(self, ones: list[int], others: list[int], ious: NDArray[np.float64]) -> None:
        """Join pieces of two tiles one to one, beginning with pairs of high scores and a high IoU.

        `ious`: (ones, others).
        """
        pairs = []
        for row, column in np.argwhere(ious > MIN_IOU).tolist():
            first, second = self.infos[ones[row]], self.infos[others[column]]
            if first["label_id"] == second["label_id"]:
                value = first["score"] * second["score"] * ious[row, column]
                pairs.append((-value, ones[row], others[column]))
        joined: set[int] = set()
        for _, one, other in sorted(pairs):
            if one not in joined and other not in joined:
                joined |= {one, other}
                self.join(one, other)

    def segments(self) -> list[tuple[list[int], dict[str, Any]]]:
        """Pieces and record of each segment that stays, in the order of their first pieces, with ids from 1.

        The score is the mean of the scores of the pieces, weighted with their pixels; the highest of fused ones, as
        within one tile.
        """
        members: dict[int, list[int]] = {}
        for piece in range(1, len(self.parents)):
            members.setdefault(self.root(piece), []).append(piece)
        segments: list[tuple[list[int], dict[str, Any]]] = []
        for pieces in members.values():
            info = self.infos[pieces[0]]
            area = sum(self.areas[piece] for piece in pieces)
            if area == 0 or (len(pieces) == 1 and not info["was_fused"] and area < MIN_PART * info["area"]):
                continue
            score = max(self.infos[piece]["score"] for piece in pieces)
            if not info["was_fused"]:
                score = sum(self.infos[piece]["score"] * self.areas[piece] for piece in pieces) / area
            segments.append((pieces, info | {"id": len(segments) + 1, "score": score, "area": area}))
        return segments


class PanopticStitch:
    """Segments without overlap; classes that are fused within a tile are fused over the image."""

    def __init__(self, grid: TileGrid):
        self.grid = grid
        self.pieces = Pieces()
        self.fused: dict[int, int] = {}  # first piece of each fused class
        self.segmentation = torch.zeros(grid.size, dtype=torch.int32, device="cpu")  # pieces
        self.beside: dict[int, Tensor] = {}  # by row, what the tile to the left saw of the strip that both see

    def add(self, tile: Tile, found: dict[str, Any]) -> None:
        """`found`: what `post_process_panoptic_segmentation` returns for a tile."""
        if tile.lead_in:
            return
        rows, columns = self.grid.rows, self.grid.columns
        y, x = rows.window(tile.row), columns.window(tile.column)
        cell_y, cell_x = rows.cell(tile.row), columns.cell(tile.column)
        infos, local = found["segments_info"], found["segmentation"].cpu()
        own = local[relative(cell_y, y), relative(cell_x, x)]
        areas = own.flatten().bincount(minlength=len(infos) + 1).tolist()  # ids are 1, 2, ...
        numbers = [self._add_piece(info, areas[info["id"]]) for info in infos]
        local = torch.tensor([0, *numbers], dtype=torch.int32, device="cpu")[local]
        if tile.column:
            before = self.beside.pop(tile.row)
            self._match(before, local[:, : before.shape[1]])
        if tile.row:  # the tile above has written what it saw down to its border, and the strip begins in its cell
            strip = slice(max(y.start, rows.cell(tile.row - 1).start), rows.shared(tile.row).stop)
            before = self.segmentation[strip, cell_x]
            self._match(before, local[relative(strip, y), relative(cell_x, x)])
        if tile.column + 1 < len(columns):
            self.beside[tile.row] = local[:, relative(columns.shared(tile.column + 1), x)].clone()
        down = slice(cell_y.start, y.stop)  # below the seam for the next tile to compare
        self.segmentation[down, cell_x] = local[relative(down, y), relative(cell_x, x)]

    def _add_piece(self, info: dict[str, Any], area: int) -> int:
        piece = self.pieces.add(info, area)
        if info["was_fused"]:
            self.pieces.join(self.fused.setdefault(info["label_id"], piece), piece)
        return piece

    def _match(self, before: Tensor, now: Tensor) -> None:
        """Join the pieces of two tiles by their pixels where both see, (h, w) each."""
        ones, first = np.unique(before.numpy(), return_inverse=True)
        others, second = np.unique(now.numpy(), return_inverse=True)
        counts = np.bincount(
            first.reshape(-1) * len(others) + second.reshape(-1), minlength=len(ones) * len(others)
        ).reshape(len(ones), len(others))
        ious = counts / np.maximum(counts.sum(1)[:, None] + counts.sum(0)[None] - counts, 1)
        ious[ones == 0] = ious[:, others == 0] = 0
        self.pieces.join_matches(ones.tolist(), others.tolist(), ious)

    def result(self) -> dict[str, Any]:
        """`segmentation` (H, W) int32 and `segments_info`, as `post_process_panoptic_segmentation` returns them."""
        segments = self.pieces.segments()
        numbers = torch.zeros(len(self.pieces.parents), dtype=torch.int32, device="cpu")
        for pieces, info in segments:
            numbers[pieces] = info["id"]
        for row in self.segmentation:  # in place: the map may be large
            row.copy_(numbers[row])
        return {"segmentation": self.segmentation, "segments_info": [info for _, info in segments]}


def _width(axis: TileAxis, index: int) -> int:
    shared = axis.shared(index)
    return shared.stop - shared.start


class InstanceStitch:
    """Scored masks, which may overlap."""

    def __init__(self, grid: TileGrid):
        self.grid = grid
        self.pieces = Pieces()
        self.masks: list[MaskRuns] = []  # of pieces 1, 2, ...: where their tiles answer
        self.strips: dict[tuple[int, int, str], tuple[list[int], list[MaskRuns]]] = {}

    def add(self, tile: Tile, found: dict[str, Any]) -> None:
        """`found`: what `post_process_instance_segmentation(return_binary_maps=True)` returns for a tile."""
        if tile.lead_in:
            return
        rows, columns = self.grid.rows, self.grid.columns
        masks = found["segmentation"].cpu().numpy()  # (n, h, w)
        cell = (rows.cell(tile.row), columns.cell(tile.column))
        window = (rows.window(tile.row), columns.window(tile.column))
        inner = tuple(relative(part, whole) for part, whole in zip(cell, window, strict=True))
        owned = MaskRuns.of_masks(masks[:, inner[0], inner[1]], self.grid.size, cell[0].start, cell[1].start)
        numbers = [self.pieces.add(info, mask.area) for info, mask in zip(found["segments_info"], owned, strict=True)]
        self.masks += owned
        if tile.column:
            shared = masks[:, :, : _width(columns, tile.column)]
            self._match(self.strips.pop((tile.row, tile.column, "left")), _present(numbers, shared))
        if tile.row:
            shared = masks[:, : _width(rows, tile.row)]
            self._match(self.strips.pop((tile.row, tile.column, "top")), _present(numbers, shared))
        if tile.column + 1 < len(columns):
            shared = masks[:, :, relative(columns.shared(tile.column + 1), window[1])]
            self.strips[tile.row, tile.column + 1, "left"] = _present(numbers, shared)
        if tile.row + 1 < len(rows):
            shared = masks[:, relative(rows.shared(tile.row + 1), window[0])]
            self.strips[tile.row + 1, tile.column, "top"] = _present(numbers, shared)

    def _match(self, before: tuple[list[int], list[MaskRuns]], now: tuple[list[int], list[MaskRuns]]) -> None:
        if before[0] and now[0]:
            one, other = (np.stack([m.dense().ravel() for m in masks]).astype(np.float32) for _, masks in (before, now))
            both = (one @ other.T).astype(np.float64)
            ious = both / (one.sum(1)[:, None] + other.sum(1)[None] - both)
            self.pieces.join_matches(before[0], now[0], ious)

    def result(self) -> dict[str, Any]:
        """`segmentation`, the runs of the masks, and `segments_info`: best score first, ids from 0."""
        segments = sorted(self.pieces.segments(), key=lambda segment: -segment[1]["score"])
        masks = [MaskRuns.union([self.masks[piece - 1] for piece in pieces]) for pieces, _ in segments]
        infos = [info | {"id": index, "area": masks[index].area} for index, (_, info) in enumerate(segments)]
        return {"segmentation": masks, "segments_info": infos, "size": self.grid.size}


def _present(numbers: list[int], masks: NDArray[np.bool_]) -> tuple[list[int], list[MaskRuns]]:
    """The masks (n, h, w) that have pixels, and the numbers of their pieces."""
    runs = MaskRuns.of_masks(masks)
    kept = [i for i, mask in enumerate(runs) if mask.area]
    return [numbers[i] for i in kept], [runs[i] for i in kept]

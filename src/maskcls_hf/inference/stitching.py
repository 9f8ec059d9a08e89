"""Results of overlapping tiles -> the result of the image, tile by tile.

Each stitcher takes the tiles in the order of `TileGrid.visits` (`add`) and gives the whole at the end (`result`). What
it holds besides the result are the strips that tiles share with neighbors still to come.

Segments of neighboring tiles are parts of one thing if they have one class and their masks inside the strip that both
tiles see have an IoU above 0.5. Each pixel takes its segment from the tile that answers for it: seams run in the middle
of the strips, so that what a tile sees only in part, at its border, does not count.

A thing that a tile finds and its neighbor does not is not cut at the seam: it stays whole where the tile sees all of
it, that is, where it does not touch the border of the tile. If it does, it ends at the seam, and is dropped if the seam
takes more than half of it. Of two things that different tiles found and that share more than half of the smaller one,
one stays: what several tiles found before what one saw whole, that before what was cut, then the one of the higher
score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.post_processing import map_of_scores
from ..models.run_lengths import MaskRuns, pairs_in_ranges
from .tiling import Tile, TileAxis, TileGrid, relative

_MIN_IOU = 0.5  # above it two segments of one tile cannot both match a third without overlapping themselves
_MIN_PART = 0.5  # of a segment that one tile alone finds and sees in part, the least part where that tile answers
_MIN_JOINED = 0.95  # of what one tile sees whole, the least part that makes do without the rest
_MAX_SHARED = 0.5  # of the smaller of two things, the largest part that both may have


class SemanticBlend:
    """Class scores, blended with weights that sum to one, and the class with the highest score.

    No class where it is not above a `score_threshold` other than 0. Holds scores of the strips of one row of a band,
    (K, strip, band); see `TileGrid.visits`.

    Args:
        grid: of the tiles.
        score_threshold: that the class of a pixel must have more than; 0: each pixel has a class.
    """

    def __init__(self, grid: TileGrid, score_threshold: float = 0.0):
        self.grid, self.score_threshold = grid, score_threshold
        self.segmentation = torch.empty(grid.size, dtype=torch.int64, device="cpu")
        self.beside: Tensor | None = None  # weighted scores of the left neighbor, (K, reach, ramp)
        self.above: dict[int, Tensor] = {}  # of the upper neighbors, by column, (K, ramp, w)

    def add(self, tile: Tile, scores: Tensor) -> None:
        """Adds a tile.

        Args:
            tile: in the order of `TileGrid.visits`.
            scores: (K, h, w) of the tile; they are changed.
        """
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


class _Pieces:
    """Segments of single tiles, and which of them are one segment of the image (union-find).

    Pieces count from 1; 0 is no segment. `infos` are the records of the tiles, whose areas are those in the tile;
    `areas` are the pixels that a piece contributes; `wholes` are the masks of things that reach over a seam and that
    their tile sees whole.
    """

    def __init__(self) -> None:
        self.parents = [0]
        self.infos: list[dict[str, Any]] = [{}]
        self.areas = [0]
        self.wholes: dict[int, MaskRuns] = {}

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
        for row, column in np.argwhere(ious > _MIN_IOU).tolist():
            first, second = self.infos[ones[row]], self.infos[others[column]]
            if first["label_id"] == second["label_id"]:
                value = first["score"] * second["score"] * ious[row, column]
                pairs.append((-value, ones[row], others[column]))
        joined: set[int] = set()
        for _, one, other in sorted(pairs):
            if one not in joined and other not in joined:
                joined |= {one, other}
                self.join(one, other)

    def segments(self) -> list[_Stitched]:
        """Those that stay, in the order of their first pieces."""
        members: dict[int, list[int]] = {}
        for piece in range(1, len(self.parents)):
            members.setdefault(self.root(piece), []).append(piece)
        segments: list[_Stitched] = []
        for pieces in members.values():
            info = self.infos[pieces[0]]
            area = sum(self.areas[piece] for piece in pieces)
            alone = len(pieces) == 1 and not info["was_fused"]
            wholes = [] if info["was_fused"] else [self.wholes[piece] for piece in pieces if piece in self.wholes]
            whole = max(wholes, key=lambda mask: mask.area, default=None)
            if whole is not None and not alone and area >= _MIN_JOINED * whole.area:
                whole = None
            if area == 0 or (alone and whole is None and area < _MIN_PART * info["area"]):
                continue
            score = max(self.infos[piece]["score"] for piece in pieces)
            if not info["was_fused"]:
                score = sum(self.infos[piece]["score"] * self.areas[piece] for piece in pieces) / area
            rank = 2 if not alone or area == info["area"] else 0 if whole is None else 1
            segments.append(_Stitched(pieces, info | {"score": score, "area": area}, whole, rank))
        return segments


@dataclass
class _Stitched:
    """A segment of the image.

    Args:
        pieces: what it is made of.
        info: its record. The score is the mean of the scores of the pieces, weighted with their pixels; the highest of
            fused ones, as within one tile.
        whole: its mask, where a tile sees all of it, and beyond the seam another does not find it.
        rank: 2: found by several tiles or within the seams of one; 1: by one alone that sees it whole; 0: cut at a
            seam.
    """

    pieces: list[int]
    info: dict[str, Any]
    whole: MaskRuns | None
    rank: int
    dropped: bool = False

    @property
    def merit(self) -> tuple[int, float]:
        return self.rank, self.info["score"]


def _cut_off(found: NDArray[Any], grid: TileGrid, tile: Tile) -> NDArray[Any]:
    """Pixels (..., P) at those borders of a tile (..., h, w) that are not borders of the image."""
    borders = []
    if tile.row:
        borders.append(found[..., 0, :])
    if tile.row + 1 < len(grid.rows):
        borders.append(found[..., -1, :])
    if tile.column:
        borders.append(found[..., :, 0])
    if tile.column + 1 < len(grid.columns):
        borders.append(found[..., :, -1])
    return np.concatenate([found[..., 0, :0], *borders], axis=-1)


class PanopticStitch:
    """Segments without overlap; classes that are fused within a tile are fused over the image.

    Args:
        grid: of the tiles.
    """

    def __init__(self, grid: TileGrid):
        self.grid = grid
        self.pieces = _Pieces()
        self.fused: dict[int, int] = {}  # first piece of each fused class
        self.segmentation = torch.zeros(grid.size, dtype=torch.int32, device="cpu")  # pieces
        self.beside: dict[int, Tensor] = {}  # by row, what the tile to the left saw of the strip that both see

    def add(self, tile: Tile, found: dict[str, Any]) -> None:
        """Adds a tile.

        Args:
            tile: in the order of `TileGrid.visits`.
            found: what `post_process_panoptic_segmentation` returns for it.
        """
        if tile.lead_in:
            return
        rows, columns = self.grid.rows, self.grid.columns
        y, x = rows.window(tile.row), columns.window(tile.column)
        cell_y, cell_x = rows.cell(tile.row), columns.cell(tile.column)
        infos, local = found["segments_info"], found["segmentation"].cpu()
        own = local[relative(cell_y, y), relative(cell_x, x)]
        areas = own.flatten().bincount(minlength=len(infos) + 1).tolist()  # ids are 1, 2, ...
        numbers = [self._add_piece(info, areas[info["id"]]) for info in infos]
        self._keep_wholes(tile, local.numpy(), infos, areas, numbers)
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

    def _keep_wholes(
        self, tile: Tile, local: NDArray[Any], infos: list[dict[str, Any]], areas: list[int], numbers: list[int]
    ) -> None:
        cut_off = set(np.unique(_cut_off(local, self.grid, tile)).tolist())
        for info, number in zip(infos, numbers, strict=True):
            if areas[info["id"]] < info["area"] and not info["was_fused"] and info["id"] not in cut_off:
                top, left = self.grid.rows.starts[tile.row], self.grid.columns.starts[tile.column]
                mask = (local == info["id"])[None]
                (self.pieces.wholes[number],) = MaskRuns.of_masks(mask, self.grid.size, top, left)

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
        self._number([segment.pieces for segment in segments], len(self.pieces.parents))
        for place in sorted(range(len(segments)), key=lambda place: segments[place].merit, reverse=True):
            if segments[place].whole is not None and not segments[place].dropped:
                self._make_whole(place, segments)
        kept = [place for place, segment in enumerate(segments) if segment.info["area"] and not segment.dropped]
        if len(kept) < len(segments):
            self._number([[place + 1] for place in kept], len(segments) + 1)
        infos = [segments[place].info | {"id": number} for number, place in enumerate(kept, start=1)]
        return {"segmentation": self.segmentation, "segments_info": infos}

    def _number(self, members: list[list[int]], count: int) -> None:
        """The numbers of the map, below `count`, become the places, from 1, of the lists that they are in, else 0."""
        numbers = torch.zeros(count, dtype=torch.int32, device="cpu")
        for number, of_segment in enumerate(members, start=1):
            numbers[of_segment] = number
        for row in self.segmentation:  # in place: the map may be large
            row.copy_(numbers[row])

    def _make_whole(self, place: int, segments: list[_Stitched]) -> None:
        """Give a thing its pixels beyond the seam, from nothing and from stuff, or drop it or what is there instead."""
        segment, number = segments[place], place + 1
        assert segment.whole is not None
        box, inside = segment.whole.window()
        view = self.segmentation.numpy()[box]
        shared = 0
        for other, common in zip(*np.unique(view[inside], return_counts=True), strict=True):
            rival = segments[other - 1]
            if other in (0, number) or rival.info["was_fused"]:
                continue
            area, common = rival.info["area"], int(common)
            if rival.whole is not None:
                area, common = rival.whole.area, common_pixels(segment.whole, rival.whole)
            if common > _MAX_SHARED * min(area, segment.whole.area):
                loser = min(segment, rival, key=lambda one: one.merit)
                self._drop(loser, number if loser is segment else int(other))
                if loser is segment:
                    return
            else:
                shared += common
        if shared > _MAX_SHARED * segment.whole.area:
            self._drop(segment, number)
            return
        is_free = np.array([True, *(s.info["was_fused"] for s in segments)])
        is_free[number] = True
        taken = inside & is_free[view]
        before, counts = np.unique(view[taken], return_counts=True)
        for other, pixels in zip(before.tolist(), counts.tolist(), strict=True):
            if other:
                segments[other - 1].info["area"] -= pixels
        view[taken] = number
        segment.info["area"] += int(counts.sum())

    def _drop(self, segment: _Stitched, number: int) -> None:
        segment.dropped = True
        y, x = self._extent(segment)
        view = self.segmentation[y, x]
        view[view == number] = 0

    def _extent(self, segment: _Stitched) -> tuple[slice, slice]:
        if segment.whole is None:
            return slice(None), slice(None)
        return segment.whole.window()[0]


def common_pixels(one: MaskRuns, other: MaskRuns) -> int:
    """Number of pixels that two masks of one image share.

    Examples:
        >>> masks = np.zeros((2, 4, 4), dtype=bool)
        >>> masks[0, :2], masks[1, 1:3] = True, True
        >>> common_pixels(*MaskRuns.of_masks(masks))
        4
    """
    left, top, width, height = one.box
    of_left, of_top, of_width, of_height = other.box
    if left >= of_left + of_width or of_left >= left + width or top >= of_top + of_height or of_top >= top + height:
        return 0
    first = np.searchsorted(other.stops, one.starts, side="right")
    end = np.searchsorted(other.starts, one.stops, side="left")
    ones, others = pairs_in_ranges(first, end)
    starts, stops = np.maximum(one.starts[ones], other.starts[others]), np.minimum(one.stops[ones], other.stops[others])
    return int((stops - starts).sum())


def _width(axis: TileAxis, index: int) -> int:
    shared = axis.shared(index)
    return int(shared.stop - shared.start)


class InstanceStitch:
    """Scored masks, which may overlap.

    Args:
        grid: of the tiles.
    """

    def __init__(self, grid: TileGrid):
        self.grid = grid
        self.pieces = _Pieces()
        self.masks: list[MaskRuns] = []  # of pieces 1, 2, ...: where their tiles answer
        self.tiles: list[tuple[int, int]] = []  # of pieces 1, 2, ...: row and column
        self.strips: dict[tuple[int, int, str], tuple[list[int], list[MaskRuns]]] = {}

    def add(self, tile: Tile, found: dict[str, Any]) -> None:
        """Adds a tile.

        Args:
            tile: in the order of `TileGrid.visits`.
            found: what `post_process_instance_segmentation(return_binary_maps=True)` returns for it.
        """
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
        self.tiles += [(tile.row, tile.column)] * len(owned)
        is_whole: NDArray[np.bool_] = np.logical_not(_cut_off(masks, self.grid, tile).any(axis=-1))
        crosses = [place for place, mask in enumerate(owned) if mask.area < masks[place].sum() and is_whole[place]]
        wholes = MaskRuns.of_masks(masks[crosses], self.grid.size, window[0].start, window[1].start)
        self.pieces.wholes |= zip([numbers[place] for place in crosses], wholes, strict=True)
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
        segments = sorted(self.pieces.segments(), key=lambda segment: -segment.info["score"])
        masks = []
        for segment in segments:
            beyond = [] if segment.whole is None else [segment.whole]
            masks.append(MaskRuns.union([self.masks[piece - 1] for piece in segment.pieces] + beyond))
        self._drop_doubles(segments, masks)
        kept = [place for place, segment in enumerate(segments) if not segment.dropped]
        masks = [masks[place] for place in kept]
        infos = [
            segments[place].info | {"id": index, "area": mask.area}
            for index, (place, mask) in enumerate(zip(kept, masks, strict=True))
        ]
        return {"segmentation": masks, "segments_info": infos, "size": self.grid.size}

    def _drop_doubles(self, segments: list[_Stitched], masks: list[MaskRuns]) -> None:
        """Of what a tile found beyond its seams and what another found there, one stays."""
        of_tile: dict[tuple[int, int], list[int]] = {}
        for place, segment in enumerate(segments):
            for piece in segment.pieces:
                of_tile.setdefault(self.tiles[piece - 1], []).append(place)
        for place in sorted(range(len(segments)), key=lambda place: segments[place].merit, reverse=True):
            segment = segments[place]
            if segment.whole is None:
                continue
            row, column = self.tiles[segment.pieces[0] - 1]
            around = [(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
            for other in sorted({other for tile in around for other in of_tile.get(tile, ())}):
                rival = segments[other]
                if segment.dropped:
                    break
                if rival is segment or rival.dropped or rival.info["label_id"] != segment.info["label_id"]:
                    continue
                smaller = min(masks[place].area, masks[other].area)
                if common_pixels(masks[place], masks[other]) > _MAX_SHARED * smaller:
                    min(segment, rival, key=lambda one: one.merit).dropped = True


def _present(numbers: list[int], masks: NDArray[np.bool_]) -> tuple[list[int], list[MaskRuns]]:
    """The masks (n, h, w) that have pixels, and the numbers of their pieces."""
    runs = MaskRuns.of_masks(masks)
    kept = [i for i, mask in enumerate(runs) if mask.area]
    return [numbers[i] for i in kept], [runs[i] for i in kept]

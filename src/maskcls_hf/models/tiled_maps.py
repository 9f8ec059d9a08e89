"""The maps of post_processing.py on a CPU: in tiles, and in a tile only for the classes or queries that can win there.

Interpolation is convex: between some cells a score lies between its least and its greatest value at them. What nowhere
reaches the least value of another one cannot win. First the cells of the logits are looked at, then the pixels of the
padded size; what is left is resized to the target. Tiles are small, so that little is left in each, and those of a row
are done together, so that operations are few. Blocks of tiles run on several threads.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .parallel import parallel_map
from .post_processing import PlainMaps, ResizeGeometry
from .resampling import bilinear_windows

TILE = 16  # padded pixels along a tile's edge
LARGEST_TILE = 128  # target pixels along a tile's edge
BLOCK = 32  # tiles of a row that are done together
GROUP = 2**19  # values of tiles that are done together: about a core's cache


class TiledMaps(PlainMaps):
    """As `PlainMaps`; another class or query only where the best scores tie to the rounding of float32."""

    def semantic_map(self, class_probs: Tensor, mask_logits: Tensor, resize: str) -> Tensor:
        """As of `PlainMaps`."""
        by_class = class_probs.T.contiguous()  # (K, N)
        segmentation = torch.empty(self.sizes.target, dtype=torch.int64, device="cpu")
        if not len(mask_logits):
            return segmentation.zero_()

        def write(block: Block) -> None:
            cells = block.window(mask_logits)  # (N, y, x)
            bounds = [torch.tensordot(by_class, bound.sigmoid(), 1) for bound in _cell_min_max(cells)]  # (K, y, x) each
            can_win = block.tile_max(_max_margin(*bounds)) >= 0  # (K, T)
            index = block.filled_with(can_win.byte().argmax(0))
            rows = block.to_padded_rows_of_all(cells)
            for pairs in block.groups(can_win & (can_win.sum(0) > 1), block.padded_area, len(mask_logits)):
                logits = block.to_padded_of_all(rows, pairs.tiles)  # (U, x, y, N)
                if resize == "logits":
                    bounds = [pairs.scores(by_class, bound.sigmoid()) for bound in _cell_min_max(logits)]
                    pairs, _ = pairs.kept(_tile_candidates(*bounds)[pairs.place, pairs.rank])
                    logits = block.to_target_of_all(block.to_padded_of_all(rows, pairs.tiles), pairs.tiles)
                    scores = pairs.scores(by_class, logits.sigmoid_())[pairs.place, pairs.rank]  # (P, W, H)
                else:
                    of_tiles = pairs.scores(by_class, logits.sigmoid_())  # (U, ranks, x, y)
                    bounds = [
                        bound.view(*of_tiles.shape[:2], *bound.shape[1:])
                        for bound in _cell_min_max(of_tiles.flatten(0, 1))
                    ]
                    left, kept = pairs.kept(_tile_candidates(*bounds)[pairs.place, pairs.rank])
                    scores = of_tiles[pairs.place[kept], pairs.rank[kept]]  # (P, x, y)
                    pairs, scores = left, block.to_target(scores.mT, left.tile).mT  # (P, W, H)
                index[pairs.tiles] = pairs.argmax(scores).mT
            block.write(segmentation, index)

        parallel_map(write, blocks(self.sizes))
        return segmentation

    def per_pixel_map(self, logits: Tensor) -> Tensor:
        """As of `PlainMaps`."""
        segmentation = torch.empty(self.sizes.target, dtype=torch.int64, device="cpu")

        def write(block: Block) -> None:
            cells = block.window(logits)  # (K, y, x)
            can_win = block.tile_max(_max_margin(*_cell_min_max(cells))) >= 0  # (K, T)
            index = block.filled_with(can_win.byte().argmax(0))
            rows = block.to_padded_rows(cells)
            for pairs in block.groups(can_win & (can_win.sum(0) > 1), block.padded_area):
                scores = block.to_padded(rows, pairs)  # (P, y, x)
                pairs, kept = pairs.that_can_win(*_cell_min_max(scores))
                index[pairs.tiles] = pairs.argmax(block.to_target(scores[kept], pairs.tile))
            block.write(segmentation, index)

        parallel_map(write, blocks(self.sizes))
        return segmentation

    def assign_pixels(self, scores: Tensor, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor, Tensor]:
        """As of `PlainMaps`."""
        winners = torch.empty(self.sizes.target, dtype=torch.int32, device="cpu")
        weights = scores[:, None, None]

        def write(block: Block) -> Tensor:
            """The areas (n,) of masks in the block."""
            cells = block.window(mask_logits)  # (n, y, x)
            least, most = _cell_min_max(cells)
            can_win = block.tile_max(_max_margin(least.sigmoid() * weights, most.sigmoid() * weights)) >= 0  # (n, T)
            least, most = -block.tile_max(-least), block.tile_max(most)  # (n, T) each
            crossed = (least < mask_logit) & (most >= mask_logit)  # by the outline of a mask
            areas = ((least >= mask_logit) * block.areas).sum(1).float()  # in tiles without their outline
            index = block.filled_with(can_win.byte().argmax(0))
            undecided = (can_win.sum(0) > 1) | crossed.any(0)
            rows = block.to_padded_rows(cells)
            for pairs in block.groups((can_win | crossed) & undecided, block.padded_area):
                logits = block.to_padded(rows, pairs)  # (P, y, x)
                bounds = _cell_min_max(logits.sigmoid() * weights[pairs.channel])
                pairs, kept = pairs.that_can_win(*bounds, or_kept=crossed)
                logits = block.to_target(logits[kept], pairs.tile)  # (P, H, W)
                inside = block.existing(torch.ge(logits, mask_logit, out=torch.empty_like(logits)), pairs.tile)
                areas.index_add_(0, pairs.channel, inside.sum((1, 2)) * crossed[pairs.channel, pairs.tile])
                index[pairs.tiles] = pairs.argmax(logits.sigmoid_().mul_(weights[pairs.channel]))
            block.write(winners, index)
            return areas

        mask_areas = torch.stack(parallel_map(write, blocks(self.sizes))).double().sum(0)
        return winners, winners.flatten().bincount(minlength=len(scores)), mask_areas.long()

    def mask_areas(self, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor]:
        """As of `PlainMaps`."""

        def measure(block: Block) -> Tensor:
            """Areas and sums of probabilities (2, n) in the block."""
            sums = torch.zeros(2, len(mask_logits), dtype=torch.float64, device="cpu")
            for pairs, logits, inside in _present(block, mask_logits, mask_logit):
                prob_sums = logits.sigmoid_().mul_(inside).sum((1, 2))
                sums.index_add_(1, pairs.channel, torch.stack([inside.sum((1, 2)), prob_sums]).double())
            return sums

        areas, prob_sums = torch.stack(parallel_map(measure, blocks(self.sizes))).sum(0)
        return areas.long(), prob_sums

    def masks(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """As of `PlainMaps`."""
        masks = torch.zeros(len(mask_logits), *self.sizes.target, dtype=torch.bool, device="cpu")

        def write(block: Block) -> None:
            for pairs, _, inside in _present(block, mask_logits, mask_logit):
                for mask, tile, pixels in zip(pairs.channel.tolist(), pairs.tile.tolist(), inside.bool(), strict=True):
                    block.write_tile(masks[mask], tile, pixels)

        parallel_map(write, blocks(self.sizes))
        return masks

    def instance_map(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """As of `PlainMaps`."""
        ids = torch.zeros(self.sizes.target, dtype=torch.int32, device="cpu")

        def write(block: Block) -> None:
            index = block.filled_with(torch.zeros(block.count, dtype=torch.int64, device="cpu"))
            for pairs, _, inside in _present(block, mask_logits, mask_logit):
                index[pairs.tiles] = pairs.first(inside)
            block.write(ids, index)

        parallel_map(write, blocks(self.sizes))
        return ids


def _present(block: "Block", mask_logits: Tensor, mask_logit: float) -> Iterator[tuple["_TilePairs", Tensor, Tensor]]:
    """Masks with the tiles of a block where they can have pixels, their logits there (P, H, W), and which are inside
    (P, H, W), as 0 and 1.
    """
    cells = block.window(mask_logits)  # (n, y, x)
    rows = block.to_padded_rows(cells)
    for pairs in block.groups(block.tile_max(_cell_min_max(cells)[1]) > mask_logit, math.prod(block.size)):
        logits = block.to_target(block.to_padded(rows, pairs), pairs.tile)
        inside = torch.gt(logits, mask_logit, out=torch.empty_like(logits))
        yield pairs, logits, block.existing(inside, pairs.tile)


class _TilePairs:
    """Pairs of a channel and a tile where it can win: first the first one of each tile, then the second ones, ...

    Tiles with most pairs come first, so that those that have an r-th pair are the first ones.
    """

    def __init__(self, chosen: Tensor) -> None:
        """`chosen`: (C, T) bool."""
        self.shape = chosen.shape
        counts = chosen.sum(0)
        self.tiles = counts.argsort(descending=True, stable=True)[: int(counts.count_nonzero())]  # (U,)
        chosen = chosen[:, self.tiles]
        channel, place = chosen.nonzero(as_tuple=True)
        rank = chosen.cumsum(0)[channel, place] - 1
        order = (rank * len(self.tiles) + place).argsort()
        self.channel, self.place, self.rank = channel[order], place[order], rank[order]  # (P,) each
        self.tile = self.tiles[self.place]
        self.sizes = self.rank.bincount().tolist()  # pairs of each rank

    def __len__(self) -> int:
        return len(self.channel)

    def by_rank(self, values: Tensor) -> Iterator[Tensor]:
        """Of values (P, ...) those of the first pairs of the tiles (U, ...), then of the second ones, ..."""
        return iter(values.split(self.sizes))

    def that_can_win(self, least: Tensor, most: Tensor, or_kept: Tensor | None = None) -> tuple["_TilePairs", Tensor]:
        """By bounds of their scores at some places (P, y, x): the pairs that can win at one (or are in (C, T) bool),
        and their indices among these pairs.
        """
        first, *others = self.by_rank(least)
        highest = first.clone()  # (U, y, x)
        for other in others:
            torch.maximum(highest[: len(other)], other, out=highest[: len(other)])
        can_win = (most - highest[self.place]).amax((1, 2)) >= 0
        return self.kept(can_win if or_kept is None else can_win | or_kept[self.channel, self.tile])

    def kept(self, kept: Tensor) -> tuple["_TilePairs", Tensor]:
        """The pairs that are kept (P,) bool, and their indices among these pairs."""
        chosen = torch.zeros(self.shape, dtype=torch.bool, device="cpu")
        chosen[self.channel[kept], self.tile[kept]] = True
        index = torch.empty(self.shape, dtype=torch.int64, device="cpu")
        index[self.channel, self.tile] = torch.arange(len(self), device="cpu")
        left = _TilePairs(chosen)
        return left, index[left.channel, left.tile]

    def argmax(self, scores: Tensor) -> Tensor:
        """Scores (P, y, x) -> the channel of the greatest in each tile (U, y, x), the first of equals, as floats: to
        compare into floats and to mix by them is many times as fast as masks of bool. The scores are overwritten.
        """
        (best, *others), (first, *channels) = self.by_rank(scores), self.by_rank(self.channel.float()[:, None, None])
        index, greater = torch.empty_like(best), torch.empty_like(best)  # laid out as the scores, which may be a .mT
        index.copy_(first)
        for score, channel in zip(others, channels, strict=True):
            tiles = len(score)
            torch.gt(score, best[:tiles], out=greater[:tiles])
            index[:tiles].lerp_(channel, greater[:tiles])
            torch.maximum(best[:tiles], score, out=best[:tiles])
        return index

    def first(self, inside: Tensor) -> Tensor:
        """Masks (P, y, x) of 0 and 1 -> 1 + the first channel that has the pixel (U, y, x), or 0; as floats."""
        index = inside.new_zeros(len(self.tiles), *inside.shape[1:])
        ranks = zip(self.by_rank(inside), self.by_rank(self.channel[:, None, None] + 1.0), strict=True)
        for mask, channel in reversed(list(ranks)):  # the first is written last
            index[: len(mask)].lerp_(channel, mask)
        return index

    def scores(self, by_class: Tensor, probs: Tensor) -> Tensor:
        """(U, ranks, x, y): class probabilities (K, N) times mask probabilities in the tiles of the pairs (U, x, y, N).

        What has no pair is the score of class 0.
        """
        classes = torch.zeros(len(self.tiles), len(self.sizes), dtype=torch.int64, device="cpu")
        classes[self.place, self.rank] = self.channel
        return torch.bmm(by_class[classes], probs.flatten(1, 2).mT).unflatten(2, probs.shape[1:3])


def _max_margin(least: Tensor, most: Tensor) -> Tensor:
    """Bounds of C scores at some places (C, y, x) -> how far each can be ahead (C, y, x); below 0 it cannot win."""
    return most - least.amax(0)


def _cell_min_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values at pixels (C, y, x, ...) -> the least and the greatest of four neighbors (C, y - 1, x - 1, ...): bounds of
    what is interpolated between them. An axis with a single pixel stays as it is.
    """
    least = most = values
    for dim in (1, 2):
        if (pairs := values.shape[dim] - 1) > 0:
            least = torch.minimum(least.narrow(dim, 0, pairs), least.narrow(dim, 1, pairs))
            most = torch.maximum(most.narrow(dim, 0, pairs), most.narrow(dim, 1, pairs))
    return least, most


def _tile_candidates(least: Tensor, most: Tensor) -> Tensor:
    """Bounds of C scores at some places of each tile (U, C, y, x) -> which can win at any of them (U, C)."""
    return (most - least.amax(1, keepdim=True)).amax((2, 3)) >= 0


class TileAxis(NamedTuple):
    """Tiles of one length along an axis. The last may stand out of the target: there it repeats its last pixel."""

    length: int  # of a tile, in target pixels
    target: int  # pixels along the axis
    cells: Tensor  # (T,): the first of the cells that a tile depends on
    to_padded: Tensor  # (T, cells, padded pixels): from these to the padded pixels that it depends on
    to_target: Tensor  # (T, padded pixels, length)

    @classmethod
    def of(cls, logits: int, padded: int, valid: int, target: int) -> "TileAxis":
        """Of an axis with so many cells, padded pixels, pixels of the image in them, and pixels of the target."""
        length = min(max(TILE * target // valid, 1), LARGEST_TILE)
        count = math.ceil(target / length)
        length = math.ceil(target / count)
        pixels = torch.arange(count * length, device="cpu").clamp(max=target - 1).view(count, length)
        pixels, to_target = bilinear_windows(pixels, valid, target)
        cells, to_padded = bilinear_windows(pixels, logits, padded)
        return cls(length, target, cells[:, 0], to_padded, to_target)


def blocks(sizes: ResizeGeometry) -> list["Block"]:
    """All tiles of a map."""
    by_axis = zip(sizes.logits, sizes.padded, sizes.valid, sizes.target, strict=True)
    rows, columns = (TileAxis.of(*of_axis) for of_axis in by_axis)
    tiles = [slice(start, start + BLOCK) for start in range(0, len(columns.cells), BLOCK)]
    return [Block(rows, columns, row, some) for row in range(len(rows.cells)) for some in tiles]


class Block:
    """Some tiles T of one row."""

    def __init__(self, rows: TileAxis, columns: TileAxis, row: int, tiles: slice) -> None:
        self.size = rows.length, columns.length  # of a tile
        self.rows_to_padded = rows.to_padded[row].T  # (padded pixels, cells)
        self.rows_to_target = rows.to_target[row].T  # (length, padded pixels)
        self.to_padded_columns = columns.to_padded[tiles]  # (T, cells, padded pixels)
        self.to_target_columns = columns.to_target[tiles]  # (T, padded pixels, length)
        first = tiles.start * columns.length
        self.count = len(self.to_target_columns)
        # values of a pair until most are out; few reach the target, of which there are more pixels
        self.padded_area = max(rows.to_padded.shape[2] * columns.to_padded.shape[2], math.prod(self.size) // 4)
        self.area = (
            slice(row * rows.length, min((row + 1) * rows.length, rows.target)),
            slice(first, min(first + self.count * columns.length, columns.target)),
        )
        height, width = (area.stop - area.start for area in self.area)
        widths = (width - torch.arange(self.count, device="cpu") * columns.length).clamp(max=columns.length)
        self.areas = height * widths  # (T,)
        self.exists: Tensor | None = None  # (T, H, W) of 0 and 1; None where all pixels are in the target
        if height < rows.length or width < self.count * columns.length:
            exists = torch.arange(columns.length, device="cpu") < widths[:, None, None]
            self.exists = (exists & (torch.arange(rows.length, device="cpu")[:, None] < height)).float()
        start = columns.cells[tiles] - columns.cells[tiles.start]
        self.cells = start  # (T,): the first cell of each, in the window
        top, left = int(rows.cells[row]), int(columns.cells[tiles.start])
        self.source = (
            slice(top, top + rows.to_padded.shape[1]),
            slice(left, left + int(start[-1]) + columns.to_padded.shape[1]),
        )

    def groups(self, chosen: Tensor, area: int, channels: int = 0) -> Iterator[_TilePairs]:
        """The pairs that are chosen (C, T), in groups of tiles that hold about `GROUP` values, if each pair holds
        `area`, and so do `channels` more of each tile.

        Args:
            chosen: (C, T) bool.
            area: values of a pair.
            channels: values of a tile beside its pairs, in areas.
        """
        counts, values = chosen.sum(0).tolist(), 0
        group: list[int] = []
        for tile, count in enumerate([*counts, None]):
            added = 0 if count is None else (count + channels) * area
            if group and (count is None or values + added > GROUP):
                of_group = torch.zeros(self.count, dtype=torch.bool, device="cpu")
                of_group[group] = True
                yield _TilePairs(chosen & of_group)
                group, values = [], 0
            if count:
                group.append(tile)
                values += added

    def window(self, maps: Tensor) -> Tensor:
        """Those cells of maps of the whole image (C, h, w) that the block depends on: (C, y, x)."""
        return maps[:, self.source[0], self.source[1]]

    def tile_max(self, bounds: Tensor) -> Tensor:
        """The greatest in each tile (C, T) of the bounds that `_cell_min_max` makes of the window."""
        width = max(1, self.to_padded_columns.shape[1] - 1)
        return bounds.amax(1).unfold(1, width, 1)[:, self.cells].amax(2)

    def to_padded_rows(self, cells: Tensor) -> Tensor:
        """The window (C, y, x) at the rows of the padded size (C, Y, x)."""
        return self.rows_to_padded @ cells

    def to_padded(self, rows: Tensor, pairs: _TilePairs) -> Tensor:
        """What `to_padded_rows` gave, at those padded pixels that the tiles of pairs depend on (P, Y, X)."""
        windows = rows.unfold(2, self.to_padded_columns.shape[1], 1)[pairs.channel, :, self.cells[pairs.tile]]
        return torch.bmm(windows, self.to_padded_columns[pairs.tile])

    def to_target(self, maps: Tensor, tile: Tensor) -> Tensor:
        """Maps at the padded pixels of a tile each (P, Y, X) -> at its pixels of the target (P, H, W)."""
        columns = torch.bmm(maps, self.to_target_columns[tile])  # (P, Y, W)
        return torch.bmm(self.rows_to_target.expand(len(maps), -1, -1), columns)

    # The same of all channels in some tiles: channels then lie side by side, for products with class probabilities.

    def to_padded_rows_of_all(self, cells: Tensor) -> Tensor:
        """The window (C, y, x) at the rows of the padded size (x, Y, C)."""
        # torch transposes two dimensions side by side in memory in blocks, and others a value at a time
        by_cell = cells.flatten(1).T.contiguous().unflatten(0, cells.shape[1:])  # (y, x, C)
        return torch.bmm(self.rows_to_padded.expand(by_cell.shape[1], -1, -1), by_cell.transpose(0, 1))

    def to_padded_of_all(self, rows: Tensor, tiles: Tensor) -> Tensor:
        """What `to_padded_rows_of_all` gave, at those padded pixels that the tiles (U,) depend on (U, X, Y, C)."""
        window, width = self.to_padded_columns.shape[1:]
        maps = rows.new_empty(len(tiles), width, *rows.shape[1:])
        rows = rows.flatten(1)
        for into, tile, start in zip(maps.flatten(2), tiles.tolist(), self.cells[tiles].tolist(), strict=True):
            torch.mm(self.to_padded_columns[tile].T, rows[start : start + window], out=into)
        return maps

    def to_target_of_all(self, maps: Tensor, tiles: Tensor) -> Tensor:
        """What `to_padded_of_all` gave -> at the pixels of the tiles in the target (U, W, H, C)."""
        columns = torch.bmm(self.to_target_columns[tiles].mT, maps.flatten(2))  # (U, W, Y * C)
        columns = columns.unflatten(2, maps.shape[2:]).flatten(0, 1)  # (U * W, Y, C)
        rows = torch.bmm(self.rows_to_target.expand(len(columns), -1, -1), columns)
        return rows.unflatten(0, (len(maps), -1))

    def existing(self, inside: Tensor, tile: Tensor) -> Tensor:
        """Pixels of masks (P, H, W) without those out of the target; in place."""
        return inside if self.exists is None else inside.mul_(self.exists[tile])

    def filled_with(self, values: Tensor) -> Tensor:
        """One value a tile (T,) -> its pixels (T, H, W), float."""
        return values.float()[:, None, None].repeat(1, *self.size)

    def write(self, out: Tensor, values: Tensor) -> None:
        """The pixels of all tiles (T, H, W) into the map of the whole image."""
        rows, columns = self.area
        of_row = values.transpose(0, 1).flatten(1)  # (H, T * W)
        out[rows, columns] = of_row[: rows.stop - rows.start, : columns.stop - columns.start]

    def write_tile(self, out: Tensor, tile: int, values: Tensor) -> None:
        """The pixels of one tile (H, W) into the map of the whole image.

        Args:
            out: (H, W), written to.
            tile: its number in the block.
            values: of a whole tile, also where it stands out of the map.
        """
        rows, columns = self.area
        start = columns.start + tile * self.size[1]
        area = out[rows, start : min(start + self.size[1], columns.stop)]
        area.copy_(values[: area.shape[0], : area.shape[1]])

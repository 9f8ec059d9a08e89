"""The maps of post_processing.py on a GPU: few operations for the whole image, none of which waits for the host.

Maps are bounded in blocks of 16 x 16 pixels at the padded size: in most of them one or a few can win, and
only those are looked at there. The kernels are written in Triton; the last one resizes to the target and finds the
greatest without storing what it compares. Without Triton the same is done by chunks of maps with a running maximum.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .post_processing import PlainMaps, ResizeGeometry
from .resampling import interpolate

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)
CHUNK_BYTES = 2**28  # of one temporary
STRIDE = 4  # cells along a block in which chunks bound the scores of classes
PIXELS = 256  # of the target, of one program
SCORED = 64  # pixels of a block, of one program
FRACTION = 2**24  # of a sum of probabilities, which is added up in integers: their order does not matter

# What is compared: values, their sigmoids times weights, whether they are at least a threshold, or sums over queries
# of class probabilities times sigmoids.
VALUES, WEIGHTED, INSIDE, PRODUCT = range(4)
WAYS = ((VALUES, False), (WEIGHTED, True), (INSIDE, False), (INSIDE, True), (PRODUCT, False))  # with sums or without


class DeviceMaps(PlainMaps):
    """As `PlainMaps`; another class or query only where the best scores tie to the rounding of float32."""

    def semantic_map(self, class_probs: Tensor, mask_logits: Tensor, resize: str) -> Tensor:
        """As of `PlainMaps`."""
        if not len(mask_logits):
            return torch.zeros(self.sizes.target, dtype=torch.int64, device=mask_logits.device)
        if resize == "logits":
            classes = _can_win(*_bounds_by_pooling(mask_logits, self.sizes, class_probs))  # (k,)
            return classes[self._greatest_at_target(class_probs[:, classes], mask_logits)]
        return greatest(mask_logits, self.sizes, PRODUCT, class_probs)[0]

    def per_pixel_map(self, logits: Tensor) -> Tensor:
        """As of `PlainMaps`."""
        return greatest(logits, self.sizes, VALUES)[0]

    def assign_pixels(self, scores: Tensor, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor, Tensor]:
        """As of `PlainMaps`."""
        winners, mask_areas, areas = greatest(mask_logits, self.sizes, WEIGHTED, scores, mask_logit, sums=True)
        return winners, areas, mask_areas

    def mask_areas(self, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor]:
        """As of `PlainMaps`."""
        return greatest(mask_logits, self.sizes, INSIDE, threshold=_next_above(mask_logit), sums=True)[1:]

    def masks(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """As of `PlainMaps`."""
        masks = torch.empty(len(mask_logits), *self.sizes.target, dtype=torch.bool, device=mask_logits.device)
        for chunk in _chunks(len(mask_logits), self.sizes.target):
            torch.gt(self.resize(mask_logits[chunk]), mask_logit, out=masks[chunk])
        return masks

    def instance_map(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """As of `PlainMaps`."""
        return greatest(mask_logits, self.sizes, INSIDE, threshold=_next_above(mask_logit))[0]

    def _greatest_at_target(self, class_probs: Tensor, mask_logits: Tensor) -> Tensor:
        """The class of the highest score (H, W), of class scores that are made of mask logits at the target size."""
        size = self.sizes.target
        maximum = _RunningMaximum(size, mask_logits.device)
        for classes in _chunks(class_probs.shape[1], size):
            scores = mask_logits.new_zeros(classes.stop - classes.start, math.prod(size))
            for queries in _chunks(len(mask_logits), size):
                mask_probs = self.resize(mask_logits[queries]).sigmoid_().flatten(1)
                scores += product(class_probs[queries, classes].T, mask_probs)
            maximum.update(scores.view(-1, *size), classes.start)
        return maximum.index


def greatest(
    logits: Tensor,
    sizes: ResizeGeometry,
    compare: int,
    weights: Tensor | None = None,
    threshold: float = 0.0,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (C, h, w), brought to the target, the index of the greatest at each pixel, the first of equals.

    Args:
        logits: (C, h, w).
        sizes: that the logits pass through.
        sums: also return what is added up over the pixels, see below.
        compare: what of them.
        weights: (C,) for `WEIGHTED`; class probabilities (C, K) for `PRODUCT`.
        threshold: for `INSIDE`, and for the sums.

    Returns:
        The index (H, W), int64, or int32 for `WEIGHTED`, or, for `INSIDE`, int32, 1 + that of the first which is at
        least `threshold`, 0 where none is. Then, with `sums`, two of (C,): in how many pixels each is at least
        `threshold`, int64, and in how many it is the greatest, int64, or, for `INSIDE`, the sum of the sigmoids of
        those at least `threshold`, float64.
    """
    if len(logits) == 0:
        dtype = torch.int32 if compare in (WEIGHTED, INSIDE) else torch.int64
        none = torch.zeros(0, dtype=torch.int64, device=logits.device)
        return torch.zeros(sizes.target, dtype=dtype, device=logits.device), none, none.double()
    by = _greatest_by_kernels if kernels_work(logits.device, compare, sums) else _greatest_by_chunks
    return by(logits, sizes, compare, logits if weights is None else weights, threshold, sums)


def _greatest_by_chunks(
    logits: Tensor, sizes: ResizeGeometry, compare: int, weights: Tensor, threshold: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes = None  # (k,), of which the maps are
    if compare in (VALUES, PRODUCT):
        classes = _can_win(*_bounds_by_pooling(logits, sizes, weights if compare == PRODUCT else None))
    if compare == PRODUCT:
        mask_probs = interpolate(logits, sizes.padded).sigmoid_().flatten(1)  # (N, padded pixels)
        maps = product(weights[:, classes].T, mask_probs).view(-1, *sizes.padded)  # (k, padded height, padded width)
        del mask_probs
    else:
        maps = interpolate(logits if classes is None else logits[classes], sizes.padded)
    maps = maps[:, : sizes.valid[0], : sizes.valid[1]]
    maximum = _RunningMaximum(sizes.target, maps.device)
    areas, prob_sums = [], []
    for chunk in _chunks(len(maps), sizes.target):
        values = interpolate(maps[chunk], sizes.target)  # (c, H, W)
        if sums or compare == INSIDE:
            inside = values >= threshold
        if sums:
            areas.append(inside.sum((1, 2)))
        if sums and compare == INSIDE:
            prob_sums.append((values.sigmoid_() * inside).sum((1, 2)))
        if compare == WEIGHTED:
            values = values.sigmoid_().mul_(weights[chunk, None, None])
        maximum.update(inside.float() if compare == INSIDE else values, chunk.start)
    index = maximum.index if compare in (WEIGHTED, INSIDE) else maximum.index.long()
    if compare == INSIDE:
        index = (index + 1).masked_fill_(maximum.value == 0, 0)
    if classes is not None:
        index = classes[index]
    if not sums:
        return index, index.new_empty(0), index.new_empty(0)
    second = torch.cat(prob_sums) if compare == INSIDE else index.flatten().bincount(minlength=len(maps))
    return index, torch.cat(areas), second


class _RunningMaximum:
    """The greatest of maps that come chunk by chunk, and its index (H, W) int32."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.value = torch.full(size, -math.inf, dtype=torch.float32, device=device)
        self.index = torch.zeros(size, dtype=torch.int32, device=device)

    def update(self, values: Tensor, first: int) -> None:
        """`values` (c, H, W) are those of the indices from `first` on."""
        value, index = values.max(0)
        greater = value > self.value
        self.value = torch.where(greater, value, self.value)
        self.index = torch.where(greater, (index + first).int(), self.index)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(a, b) @ (b, c) in float32, also where TF32 is allowed, which would round scores to three digits."""
    backend = torch.backends.cuda.matmul
    precision = backend.fp32_precision if backend.fp32_precision != "none" else torch.backends.fp32_precision  # type: ignore[attr-defined]
    if left.is_cuda and precision == "tf32":
        return (left.double() @ right.double()).float()
    return left @ right


def _bounds_by_pooling(logits: Tensor, sizes: ResizeGeometry, class_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the greatest value (K, blocks) in blocks of cells, of logits or of class scores made of them.

    Each pixel of the target lies between cells of one block: along an axis it is made of two neighbors at the padded
    size, each between two cells.
    """
    edges = [
        min(cells, STRIDE + 1 + math.ceil(cells / pixels))
        for cells, pixels in zip(sizes.logits, sizes.padded, strict=True)
    ]
    upper = F.max_pool2d(logits, edges, STRIDE, ceil_mode=True).flatten(1)
    lower = -F.max_pool2d(-logits, edges, STRIDE, ceil_mode=True).flatten(1)
    if class_probs is None:
        return lower, upper
    return product(class_probs.T, lower.sigmoid()), product(class_probs.T, upper.sigmoid())


def _can_win(lower: Tensor, upper: Tensor) -> Tensor:
    """Bounds of scores (K, blocks) -> the classes (k,) that no other one is above in all blocks."""
    return (upper >= lower.amax(0)).any(1).nonzero()[:, 0]


def _next_above(threshold: float) -> float:
    """What is above the threshold is at least this, in float32."""
    value = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    return value.nextafter(torch.tensor(math.inf, device="cpu")).item()


def _chunks(count: int, size: tuple[int, int]) -> Iterator[slice]:
    """Of as many maps (H, W) as `CHUNK_BYTES` hold."""
    step = max(1, CHUNK_BYTES // (4 * math.prod(size)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@cache
def kernels_work(device: torch.device, compare: int, sums: bool) -> bool:
    """Whether the kernels run here and give what chunks give.

    Args:
        device: of the logits.
        compare: `VALUES`, `WEIGHTED`, `INSIDE` or `PRODUCT`.
        sums: whether the kernels add up pixels, too.
    """
    if triton is None or device.type != "cuda":
        return False
    try:
        check_kernels(device, compare, sums)
    except Exception as error:  # of a compiler or driver, whatever it is
        logger.debug(f"Maps are made without the Triton kernels: {error}")
        return False
    return True


def check_kernels(device: torch.device, compare: int, sums: bool) -> None:
    """Raises AssertionError where the kernels give something else than chunks for a small example.

    Args:
        device: CUDA.
        compare: `VALUES`, `WEIGHTED`, `INSIDE` or `PRODUCT`.
        sums: whether the kernels add up pixels, too.
    """
    logits = torch.arange(20 * 7 * 9, dtype=torch.float32, device=device).view(20, 7, 9).mul_(2.1).sin_()
    weights = logits  # not looked at
    if compare == WEIGHTED:
        weights = torch.linspace(0.5, 1, 20, device=device)
    elif compare == PRODUCT:
        weights = torch.arange(20 * 22, device=device).view(20, 22).mul(1.3).cos_().softmax(1)
    sizes = ResizeGeometry((7, 9), (28, 36), (27, 33), (41, 52))
    found, expected = (
        by(logits, sizes, compare, weights, 0.3, sums) for by in (_greatest_by_kernels, _greatest_by_chunks)
    )
    different = (found[0] != expected[0]).float().mean().item()  # where two tie
    assert different < 0.01, f"{different:.1%} of the pixels are different"
    torch.testing.assert_close(found[1:], expected[1:], atol=5, rtol=1e-4, check_dtype=False)


def _greatest_by_kernels(
    logits: Tensor, sizes: ResizeGeometry, compare: int, weights: Tensor, threshold: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits, device = logits.contiguous(), logits.device
    (rows, columns), (padded_rows, padded_columns) = sizes.logits, sizes.padded
    (valid_rows, valid_columns), (height, width) = sizes.valid, sizes.target
    count, across = len(logits), -(-valid_columns // 16)
    blocks = -(-valid_rows // 16) * across
    with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
        bounds = logits.new_empty(count, 2 * blocks)  # the lower ones, then the upper ones
        _bound[(blocks, -(-count // 32))](
            logits, weights, bounds, count, rows, columns, padded_rows, padded_columns,
            valid_rows, valid_columns, across, threshold, COMPARE=compare, enable_fp_fusion=True,
        )  # fmt: skip
        if compare == PRODUCT:
            bounds = product(weights.T, bounds)  # (K, 2 * blocks)
            count = len(bounds)
        least = bounds[:, :blocks].amax(0)  # (blocks,): what can win has at least this
        candidates = torch.empty(2, blocks, count, dtype=torch.int32, device=device)  # of a block; and of those it ends
        counts = torch.empty(2, blocks, dtype=torch.int32, device=device)
        _list_candidates[(-(-blocks // 16),)](
            bounds, least, candidates, counts, count, blocks, across, AROUND=compare == PRODUCT, enable_fp_fusion=True
        )
        if compare == PRODUCT:
            maps = logits.new_empty(count, valid_rows, valid_columns)  # written where a candidate is
            mask_probs = logits.new_empty(blocks, len(logits), 256)
            _upsample[(blocks, -(-len(logits) // 8))](
                logits, counts, mask_probs, len(logits), rows, columns, across, rows / padded_rows,
                columns / padded_columns, enable_fp_fusion=True,
            )  # fmt: skip
            _score[(blocks, 256 // SCORED)](
                weights, mask_probs, candidates, counts, maps, len(logits), count, valid_rows, valid_columns, across,
                weights.stride(0), SCORED=SCORED, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
            del mask_probs
        else:
            maps = interpolate(logits, sizes.padded)  # (C, padded height, padded width)
        index = torch.empty(
            sizes.target, dtype=torch.int32 if compare in (WEIGHTED, INSIDE) else torch.int64, device=device
        )
        totals = torch.zeros(2, count if sums else 0, dtype=torch.int64, device=device)
        most = math.prod(  # pixels of the target in a block
            math.ceil(16.5 * pixels / valid) + 1 for pixels, valid in zip(sizes.target, sizes.valid, strict=True)
        )
        _find_greatest[(blocks, -(-most // PIXELS))](
            maps, weights, candidates, counts, index, totals,
            maps.stride(0), maps.stride(1), count, valid_rows, valid_columns, height, width, across,
            valid_rows / height, valid_columns / width, threshold,
            COMPARE=0 if compare == PRODUCT else compare, SUMS=sums, PIXELS=PIXELS, enable_fp_fusion=True,
        )  # fmt: skip
    areas, second = totals
    return index, areas, second.double() / FRACTION if compare == INSIDE and sums else second


if triton is not None:
    SIZES = ["count", "queries", "rows", "columns", "padded_rows", "padded_columns", "valid_rows", "valid_columns"]
    SIZES += ["height", "width", "across", "blocks", "map_stride", "row_stride", "probs_stride"]
    SIZES += ["threshold", "row_scale", "column_scale"]
    kernel = triton.jit(do_not_specialize=SIZES)  # one compilation for all sizes

    @triton.jit
    def _cells(block, cells, padded, valid):
        """The first and the last cell between which the pixels `16 * block` to `16 * block + 16` lie."""
        first, last = 16 * block, tl.minimum(16 * block + 16, valid - 1)
        first_cell = tl.maximum((2 * first + 1) * cells - padded, 0) // (2 * padded)
        return first_cell, tl.minimum(((2 * last + 1) * cells + padded) // (2 * padded), cells - 1)

    @triton.jit
    def _first_pixel(block, valid, pixels):
        """The first of `pixels` of the target that lies at or after the middle of pixel `16 * block`, of `valid`."""
        place = ((32 * block + 1).to(tl.int64) * pixels + valid - 1) // valid // 2
        first = tl.where(block == 0, 0, tl.where(16 * block >= valid, pixels, tl.minimum(place, pixels)))
        return first.to(tl.int32)

    @triton.jit
    def _neighbors(place, scale, first, last, end):
        """The two between which places lie, the first of them from `first` to `last`, and the weight of the second, as
        `F.interpolate` has them, so that they round alike.
        """
        source = tl.maximum((place.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
        near = tl.minimum(tl.maximum(source.to(tl.int32), first), last)
        return near, tl.minimum(near + 1, end), tl.maximum(source - near.to(tl.float32), 0.0)

    @triton.jit
    def _bilinear(maps, top, bottom, below, left, right, beside):
        """Values at places between rows `top` and `bottom`, which are offsets, and columns `left` and `right`."""
        upper = (1 - beside) * tl.load(maps + (top + left)) + beside * tl.load(maps + (top + right))
        lower = (1 - beside) * tl.load(maps + (bottom + left)) + beside * tl.load(maps + (bottom + right))
        return (1 - below) * upper + below * lower

    @kernel
    def _bound(
        logits, weights, bounds, count, rows, columns, padded_rows, padded_columns, valid_rows, valid_columns, across,
        threshold, COMPARE: tl.constexpr,
    ):  # fmt: skip
        """Bounds of what is compared, of 32 maps in one block.

        What is at least the threshold somewhere counts as the greatest: it is looked at.
        """
        block, blocks = tl.program_id(0), tl.num_programs(0)
        top, bottom = _cells(block // across, rows, padded_rows, valid_rows)
        left, right = _cells(block % across, columns, padded_columns, valid_columns)
        index = tl.program_id(1) * 32 + tl.arange(0, 32)
        maps = logits + tl.minimum(index, count - 1).to(tl.int64)[:, None] * rows * columns
        cell = tl.arange(0, 64)[None, :]  # of 8 x 8
        least = tl.full((32,), float("inf"), tl.float32)
        greatest = tl.full((32,), -float("inf"), tl.float32)
        for y in range(top, bottom + 1, 8):
            for x in range(left, right + 1, 8):
                place = tl.minimum(y + cell // 8, bottom) * columns + tl.minimum(x + cell % 8, right)
                values = tl.load(maps + place)
                least = tl.minimum(least, tl.min(values, 1))
                greatest = tl.maximum(greatest, tl.max(values, 1))
        if COMPARE == 1:  # WEIGHTED
            weight = tl.load(weights + index, mask=index < count, other=0.0)
            lower = weight * tl.sigmoid(least)
            upper = tl.where(greatest >= threshold, float("inf"), weight * tl.sigmoid(greatest))
        elif COMPARE == 2:  # INSIDE
            lower = tl.zeros((32,), tl.float32)
            upper = tl.where(greatest >= threshold, 1.0, -1.0)
        elif COMPARE == 3:  # PRODUCT
            lower, upper = tl.sigmoid(least), tl.sigmoid(greatest)
        else:
            lower, upper = least, greatest
        places = bounds + index.to(tl.int64) * 2 * blocks + block
        tl.store(places, lower, mask=index < count)
        tl.store(places + blocks, upper, mask=index < count)

    @triton.jit
    def _limits(least, block):
        """What can win in blocks has at least this, but for rounding: (1, blocks)."""
        value = tl.load(least + block)[None, :]
        return value - 1e-6 * tl.abs(value)

    @kernel
    def _list_candidates(bounds, least, candidates, counts, count, blocks, across, AROUND: tl.constexpr):
        """The indices that can win in a block, in their order, for 16 blocks.

        `AROUND`: also those that can win in it or in one of the three before it, which look at its first row or column.
        """
        block = tl.program_id(0) * 16 + tl.arange(0, 16)
        exists = block < blocks
        block = tl.minimum(block, blocks - 1)
        above = tl.where(block >= across, block - across, block)
        beside = tl.where(block % across > 0, 1, 0)
        limit = _limits(least, block)
        if AROUND:
            limit_above = _limits(least, above)
            limit_beside = _limits(least, block - beside)
            limit_across = _limits(least, above - beside)
        number = tl.zeros((16,), tl.int32)
        number_around = tl.zeros((16,), tl.int32)
        for first in range(0, count, 32):
            index = first + tl.arange(0, 32)[:, None]
            there = (index < count) & exists[None, :]
            upper = bounds + tl.minimum(index, count - 1).to(tl.int64) * 2 * blocks + blocks  # (32, 1)
            wins = tl.load(upper + block[None, :]) >= limit
            place = candidates + block[None, :].to(tl.int64) * count
            kept = (wins & there).to(tl.int32)
            tl.store(place + number[None, :] + tl.cumsum(kept, 0) - 1, index + kept * 0, mask=kept > 0)
            number += tl.sum(kept, 0)
            if AROUND:
                wins = wins | (tl.load(upper + above[None, :]) >= limit_above)
                wins = wins | (tl.load(upper + (block - beside)[None, :]) >= limit_beside)
                wins = wins | (tl.load(upper + (above - beside)[None, :]) >= limit_across)
                kept = (wins & there).to(tl.int32)
                place += blocks.to(tl.int64) * count
                tl.store(place + number_around[None, :] + tl.cumsum(kept, 0) - 1, index + kept * 0, mask=kept > 0)
                number_around += tl.sum(kept, 0)
        tl.store(counts + block, number, mask=exists)
        tl.store(counts + blocks + block, number_around, mask=exists)

    @kernel
    def _upsample(
        logits, counts, probs, queries, rows, columns, across, row_scale, column_scale,
    ):  # fmt: skip
        """Mask probabilities (blocks, N, 256) at the padded size, of 8 queries in one block.

        Where only one class can win nobody looks at them.
        """
        block, blocks = tl.program_id(0), tl.num_programs(0)
        if tl.load(counts + blocks + block) > 1:
            pixel = tl.arange(0, 256)[None, :]
            row, column = block // across * 16 + pixel // 16, block % across * 16 + pixel % 16
            top, bottom, below = _neighbors(row, row_scale, 0, rows - 1, rows - 1)
            left, right, beside = _neighbors(column, column_scale, 0, columns - 1, columns - 1)
            query = tl.program_id(1) * 8 + tl.arange(0, 8)[:, None]
            maps = logits + tl.minimum(query, queries - 1).to(tl.int64) * rows * columns
            values = tl.sigmoid(_bilinear(maps, top * columns, bottom * columns, below, left, right, beside))
            tl.store(probs + (block.to(tl.int64) * queries + query) * 256 + pixel, values, mask=query < queries)

    @triton.jit
    def _score_some(
        class_probs, mask_probs, candidates, first, number, scores, score_stride, exists, queries, probs_stride,
        CLASSES: tl.constexpr, SCORED: tl.constexpr,
    ):  # fmt: skip
        """Scores of up to `CLASSES` of the candidates."""
        slot = first + tl.arange(0, CLASSES)
        label = tl.load(candidates + slot, mask=slot < number, other=0)[:, None]
        total = tl.zeros((CLASSES, SCORED), tl.float32)
        for start in range(0, queries, 16):
            query = start + tl.arange(0, 16)
            places = class_probs + query[None, :] * probs_stride + label
            of_classes = tl.load(places, mask=query[None, :] < queries, other=0.0)  # (CLASSES, 16)
            of_masks = tl.load(mask_probs + query[:, None] * 256, mask=query[:, None] < queries, other=0.0)
            total = tl.dot(of_classes, of_masks, total, input_precision="tf32x3")
        tl.store(scores + label.to(tl.int64) * score_stride, total, mask=(slot < number)[:, None] & exists)

    @kernel
    def _score(
        class_probs, mask_probs, candidates, counts, scores, queries, count, valid_rows, valid_columns, across,
        probs_stride, SCORED: tl.constexpr,
    ):  # fmt: skip
        """Class scores (K, valid height, valid width) at `SCORED` pixels of one block, of the classes that are looked
        at there.
        """
        block, blocks = tl.program_id(0), tl.num_programs(0)
        number = tl.load(counts + blocks + block)
        pixel = tl.program_id(1) * SCORED + tl.arange(0, SCORED)[None, :]
        row, column = block // across * 16 + pixel // 16, block % across * 16 + pixel % 16
        exists = (row < valid_rows) & (column < valid_columns)
        candidates += (blocks + block).to(tl.int64) * count
        mask_probs += block.to(tl.int64) * queries * 256 + pixel
        scores += row * valid_columns + column
        score_stride = valid_rows * valid_columns
        if number > 1:
            for first in range(0, number, 32):
                if number - first <= 16:
                    _score_some(
                        class_probs, mask_probs, candidates, first, number, scores, score_stride, exists, queries,
                        probs_stride, CLASSES=16, SCORED=SCORED,
                    )  # fmt: skip
                else:
                    _score_some(
                        class_probs, mask_probs, candidates, first, number, scores, score_stride, exists, queries,
                        probs_stride, CLASSES=32, SCORED=SCORED,
                    )  # fmt: skip

    @kernel
    def _find_greatest(
        maps, weights, candidates, counts, index, totals, map_stride, row_stride, count, rows, columns, height, width,
        across, row_scale, column_scale, threshold,
        COMPARE: tl.constexpr, SUMS: tl.constexpr, PIXELS: tl.constexpr,
    ):  # fmt: skip
        """`PIXELS` of the pixels of the target in one block, row by row."""
        block = tl.program_id(0)
        block_row, block_column = block // across, block % across
        first_row, first_column = _first_pixel(block_row, rows, height), _first_pixel(block_column, columns, width)
        block_height = _first_pixel(block_row + 1, rows, height) - first_row
        block_width = _first_pixel(block_column + 1, columns, width) - first_column
        pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
        exists = pixel < block_height * block_width
        row = first_row + pixel // tl.maximum(block_width, 1)
        column = first_column + pixel % tl.maximum(block_width, 1)
        last_row, last_column = (
            tl.minimum(block_row * 16 + 15, rows - 1),
            tl.minimum(block_column * 16 + 15, columns - 1),
        )
        top, bottom, below = _neighbors(row, row_scale, block_row * 16, last_row, rows - 1)
        left, right, beside = _neighbors(column, column_scale, block_column * 16, last_column, columns - 1)
        top, bottom = top * row_stride, bottom * row_stride

        number = tl.load(counts + block)
        number = tl.where(tl.program_id(1) * PIXELS < block_height * block_width, number, 0)
        candidates += block.to(tl.int64) * count
        best = tl.full((PIXELS,), -float("inf") if COMPARE == 0 else -1.0 if COMPARE == 1 else 0.0, tl.float32)
        best_index = tl.zeros((PIXELS,), tl.int32)
        start = 0
        if COMPARE == 0:  # the only one wins, whatever its value
            best_index += tl.load(candidates, mask=number > 0, other=0)
            start = tl.where(number == 1, 1, 0)
        for slot in range(start, number):
            i = tl.load(candidates + slot)
            value = _bilinear(maps + i.to(tl.int64) * map_stride, top, bottom, below, left, right, beside)
            if SUMS or COMPARE == 2:
                inside = exists & (value >= threshold)
            if SUMS:
                area = tl.sum(inside.to(tl.int32))
                tl.atomic_add(totals + i, area.to(tl.int64), mask=area > 0, sem="relaxed")
                if COMPARE == 2:
                    probs = tl.sum(tl.where(inside, tl.sigmoid(value), 0.0)) * 16777216.0  # FRACTION
                    tl.atomic_add(totals + count + i, probs.to(tl.int64), mask=area > 0, sem="relaxed")
            if COMPARE == 1:
                value = tl.sigmoid(value) * tl.load(weights + i)
            if COMPARE == 2:
                value = tl.where(inside, 1.0, 0.0)
                i += 1
            best_index = tl.where(value > best, i, best_index)
            best = tl.maximum(best, value)
        tl.store(index + row.to(tl.int64) * width + column, best_index, mask=exists)
        if COMPARE == 1:
            for slot in range(0, number):
                i = tl.load(candidates + slot)
                area = tl.sum((exists & (best_index == i)).to(tl.int32))
                tl.atomic_add(totals + count + i, area.to(tl.int64), mask=area > 0, sem="relaxed")

"""The maps of post_processing.py on a GPU: few operations for the whole image, none of which waits for the host.

Classes that can win nowhere go before anything is upsampled. Logits are upsampled to the padded size; the resize from
there to the target and the search for the greatest are one kernel, which never stores what it compares. It is written
in Triton; without Triton the same is done by chunks of maps with a running maximum.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .post_processing import PlainMaps, interpolate

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)
CHUNK_BYTES = 2**28  # of one temporary
STRIDE = 4  # cells along a block in which the scores of classes are bounded
PIXELS = 512  # of one program of the kernel

# What is compared: values, sigmoids of them times weights, or whether they are at least a threshold.
VALUES, WEIGHTED, INSIDE = range(3)


class DeviceMaps(PlainMaps):
    """As `PlainMaps`; another class or query only where the best scores tie to the rounding of float32."""

    def semantic_map(self, class_probs: Tensor, mask_logits: Tensor, resize: str) -> Tensor:
        if not len(mask_logits):
            return torch.zeros(self.sizes.target, dtype=torch.int64, device=mask_logits.device)
        lower, upper = (product(class_probs.T, bound.sigmoid()) for bound in self._bounds(mask_logits))  # (K, blocks)
        classes = _can_win(lower, upper)  # (k,)
        class_probs = class_probs[:, classes]  # (N, k)
        if resize == "logits":
            return classes[self._greatest_at_target(class_probs, mask_logits)]
        mask_probs = interpolate(mask_logits, self.sizes.padded).sigmoid_().flatten(1)  # (N, padded pixels)
        scores = product(class_probs.T, mask_probs).view(-1, *self.sizes.padded)  # (k, padded height, padded width)
        del mask_probs
        height, width = self.sizes.valid
        return classes[greatest(scores[:, :height, :width], self.sizes.target)[0]]

    def per_pixel_map(self, logits: Tensor) -> Tensor:
        classes = _can_win(*self._bounds(logits))  # (k,)
        return classes[greatest(self.to_padded_size(logits[classes]), self.sizes.target)[0]]

    def assign_pixels(self, scores: Tensor, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.to_padded_size(mask_logits)
        winners, mask_areas, areas = greatest(maps, self.sizes.target, WEIGHTED, scores, mask_logit, sums=True)
        return winners, areas.long(), mask_areas

    def mask_areas(self, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor]:
        maps = self.to_padded_size(mask_logits)
        return greatest(maps, self.sizes.target, INSIDE, threshold=_next_above(mask_logit), sums=True)[1:]

    def masks(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        masks = torch.empty(len(mask_logits), *self.sizes.target, dtype=torch.bool, device=mask_logits.device)
        for chunk in _chunks(len(mask_logits), self.sizes.target):
            torch.gt(self.resize(mask_logits[chunk]), mask_logit, out=masks[chunk])
        return masks

    def instance_map(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        maps = self.to_padded_size(mask_logits)
        return greatest(maps, self.sizes.target, INSIDE, threshold=_next_above(mask_logit))[0] + 1

    def _bounds(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest logit (C, blocks) in blocks of cells. Each pixel of the target lies between cells
        of one block: along an axis it is made of two neighbors at the padded size, each between two cells."""
        edges = [
            min(cells, STRIDE + 1 + math.ceil(cells / pixels))
            for cells, pixels in zip(self.sizes.logits, self.sizes.padded, strict=True)
        ]
        most = F.max_pool2d(logits, edges, STRIDE, ceil_mode=True)
        return -F.max_pool2d(-logits, edges, STRIDE, ceil_mode=True).flatten(1), most.flatten(1)

    def _greatest_at_target(self, class_probs: Tensor, mask_logits: Tensor) -> Tensor:
        """The class of the highest score (H, W), of class scores that are made of mask logits at the target size."""
        size = self.sizes.target
        maximum = RunningMaximum(size, mask_logits.device)
        for classes in _chunks(class_probs.shape[1], size):
            scores = mask_logits.new_zeros(classes.stop - classes.start, math.prod(size))
            for queries in _chunks(len(mask_logits), size):
                mask_probs = self.resize(mask_logits[queries]).sigmoid_().flatten(1)
                scores += product(class_probs[queries, classes].T, mask_probs)
            maximum.update(scores.view(-1, *size), classes.start)
        return maximum.index


def greatest(
    maps: Tensor,
    size: tuple[int, int],
    compare: int = VALUES,
    weights: Tensor | None = None,
    threshold: float = 0.0,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of maps (C, y, x), resized to `size`, the index of the greatest at each pixel (H, W) int32, the first of equals.

    Args:
        compare: what of them. `INSIDE`: the index of the first that is at least `threshold`, or -1.
        weights: (C,), for `WEIGHTED`.

    Returns:
        The indices, and with `sums` two of (C,): in how many pixels a map is at least `threshold`, int64, and in how
        many it is the greatest, or, for `INSIDE`, the sum of the sigmoids of those at least `threshold`.
    """
    if len(maps) == 0:
        index, none = torch.full(size, -1, dtype=torch.int32, device=maps.device), maps.new_zeros(0)
        return index, none.long(), none
    if kernel_works(maps.device, compare, sums):
        return _greatest_by_kernel(maps, size, compare, weights, threshold, sums)
    return _greatest_by_chunks(maps, size, compare, weights, threshold, sums)


def _greatest_by_chunks(
    maps: Tensor, size: tuple[int, int], compare: int, weights: Tensor | None, threshold: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    maximum = RunningMaximum(size, maps.device)
    areas, prob_sums = [], []
    for chunk in _chunks(len(maps), size):
        values = interpolate(maps[chunk], size)  # (c, H, W)
        if sums or compare == INSIDE:
            inside = values >= threshold
        if sums:
            areas.append(inside.sum((1, 2)))
        if sums and compare == INSIDE:
            prob_sums.append((values.sigmoid_() * inside).sum((1, 2)))
        if weights is not None and compare == WEIGHTED:
            values = values.sigmoid_().mul_(weights[chunk, None, None])
        maximum.update(inside.float() if compare == INSIDE else values, chunk.start)
    index = maximum.index
    if compare == INSIDE:
        index = index.masked_fill(maximum.value == 0, -1)
    if not sums:
        return index, index, index
    second = torch.cat(prob_sums) if compare == INSIDE else index.flatten().bincount(minlength=len(maps))
    return index, torch.cat(areas), second


class RunningMaximum:
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
    backend: Any = torch.backends.cuda.matmul
    everywhere: Any = torch.backends
    precision = backend.fp32_precision if backend.fp32_precision != "none" else everywhere.fp32_precision
    if left.is_cuda and precision == "tf32":
        return (left.double() @ right.double()).float()
    return left @ right


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
def kernel_works(device: torch.device, compare: int, sums: bool) -> bool:
    """Whether the kernel runs here and gives what chunks give."""
    if triton is None or device.type != "cuda":
        return False
    try:
        maps = torch.arange(5 * 7 * 9, dtype=torch.float32, device=device).view(5, 7, 9).mul_(2.1).sin_()
        arguments = (maps, (26, 31), compare, torch.linspace(0.5, 1, 5, device=device), 0.3, sums)
        found, expected = _greatest_by_kernel(*arguments), _greatest_by_chunks(*arguments)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5, check_dtype=False)
    except Exception as error:  # of a compiler or driver, whatever it is
        logger.debug(f"Maps are made without the Triton kernel: {error}")
        return False
    return True


def _greatest_by_kernel(
    maps: Tensor, size: tuple[int, int], compare: int, weights: Tensor | None, threshold: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    maps = maps if maps.stride(2) == 1 else maps.contiguous()
    count, (rows, columns), (height, width) = len(maps), maps.shape[1:], size
    programs = triton.cdiv(height * width, PIXELS)
    index = torch.empty(size, dtype=torch.int32, device=maps.device)
    parts = maps.new_empty(2, count, programs if sums else 0)  # faster summed up below than by atomic additions
    with torch.cuda.device(maps.device) if maps.is_cuda else torch.no_grad():
        _kernel[(programs,)](
            maps, maps if weights is None else weights, index, parts,
            maps.stride(0), maps.stride(1), count, rows, columns, height, width,
            rows / height, columns / width, threshold,
            COMPARE=compare, SUMS=sums, PIXELS=PIXELS, enable_fp_fusion=True,
        )  # fmt: skip
    areas, second = parts.sum(2, dtype=torch.float64)
    return index, areas.long(), second


if triton is not None:

    @triton.jit(do_not_specialize=[4, 5, 6, 7, 8, 9, 10])  # one compilation for all sizes
    def _kernel(
        maps, weights, index, parts,
        map_stride, row_stride, count, rows, columns, height, width,
        row_scale, column_scale, threshold,
        COMPARE: tl.constexpr, SUMS: tl.constexpr, PIXELS: tl.constexpr,
    ):  # fmt: skip
        """Each program does `PIXELS` pixels of the target, one after the other in memory. Positions as
        `F.interpolate` has them, so that they round alike."""
        program, programs = tl.program_id(0), tl.num_programs(0)
        pixel = program * PIXELS + tl.arange(0, PIXELS)
        exists = pixel < height * width
        row, column = pixel // width, pixel % width
        source = tl.maximum((row.to(tl.float32) + 0.5) * row_scale - 0.5, 0.0)
        top = tl.minimum(source.to(tl.int32), rows - 1)
        below = source - top.to(tl.float32)
        bottom = tl.minimum(top + 1, rows - 1)
        source = tl.maximum((column.to(tl.float32) + 0.5) * column_scale - 0.5, 0.0)
        left = tl.minimum(source.to(tl.int32), columns - 1)
        beside = source - left.to(tl.float32)
        right = tl.minimum(left + 1, columns - 1)
        top, bottom = top * row_stride, bottom * row_stride

        best = tl.full((PIXELS,), -float("inf") if COMPARE == 0 else -1.0 if COMPARE == 1 else 0.0, tl.float32)
        best_index = tl.full((PIXELS,), -1 if COMPARE == 2 else 0, tl.int32)
        for i in range(count):
            upper = (1 - beside) * tl.load(maps + top + left) + beside * tl.load(maps + top + right)
            lower = (1 - beside) * tl.load(maps + bottom + left) + beside * tl.load(maps + bottom + right)
            value = (1 - below) * upper + below * lower
            maps += map_stride
            if SUMS or COMPARE == 2:
                inside = exists & (value >= threshold)
            if SUMS:
                tl.store(parts + i * programs + program, tl.sum(tl.where(inside, 1.0, 0.0)))
                if COMPARE == 2:
                    probs = tl.sum(tl.where(inside, tl.sigmoid(value), 0.0))
                    tl.store(parts + (count + i) * programs + program, probs)
            if COMPARE == 1:
                value = tl.sigmoid(value) * tl.load(weights + i)
            if COMPARE == 2:
                value = tl.where(inside, 1.0, 0.0)
            best_index = tl.where(value > best, i, best_index)
            best = tl.maximum(best, value)
        tl.store(index + pixel, best_index, mask=exists)
        if SUMS and COMPARE != 2:
            for i in range(count):
                greatest = tl.sum(tl.where(exists & (best_index == i), 1.0, 0.0))
                tl.store(parts + (count + i) * programs + program, greatest)

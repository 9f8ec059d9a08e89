"""What losses.py computes of the pixels of matched masks, in one kernel each (Triton), for a GPU.

The operations of PyTorch read and write each pixel about fifty times; these read a byte of the mask, and of the logits
what the cache has. Optional: without Triton, or where it fails, the losses are computed as on a CPU.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)
BLOCK = 1024  # pixels of a program at a time
REPEATS = 8  # of blocks, in one sum
SIZES = ["h", "w", "height", "width", "step_y", "step_x"]  # one compilation for all


if triton is not None:

    @triton.jit
    def _pixel(
        logits, masks, valid, sources, images, segments, mask, pixel, h, w, height, width, step_y, step_x,
        IS_INDEX_MAP: tl.constexpr, HAS_VALID: tl.constexpr,
    ):  # fmt: skip
        """Sign, 1 - p_t and cross-entropy of some pixels of one mask; bilinear as torch's `align_corners=False`."""
        inside_image = pixel < height * width
        y, x = pixel // width, pixel % width
        from_y = tl.maximum((y.to(tl.float32) + 0.5) * step_y - 0.5, 0.0)
        from_x = tl.maximum((x.to(tl.float32) + 0.5) * step_x - 0.5, 0.0)
        top, left = tl.minimum(from_y.to(tl.int32), h - 1), tl.minimum(from_x.to(tl.int32), w - 1)
        down, right = from_y - top.to(tl.float32), from_x - left.to(tl.float32)
        bottom, beyond = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
        cells = logits + mask.to(tl.int64) * h * w
        upper_left = tl.load(cells + top * w + left, mask=inside_image, other=0.0).to(tl.float32)
        upper_right = tl.load(cells + top * w + beyond, mask=inside_image, other=0.0).to(tl.float32)
        lower_left = tl.load(cells + bottom * w + left, mask=inside_image, other=0.0).to(tl.float32)
        lower_right = tl.load(cells + bottom * w + beyond, mask=inside_image, other=0.0).to(tl.float32)
        upper = (1 - right) * upper_left + right * upper_right
        lower = (1 - right) * lower_left + right * lower_right
        logit = (1 - down) * upper + down * lower
        source = tl.load(sources + mask).to(tl.int64) * height * width
        value = tl.load(masks + source + pixel, mask=inside_image, other=0)
        if IS_INDEX_MAP:  # noqa: SIM108 - decided when compiled
            in_segment = value.to(tl.int32) == tl.load(segments + mask).to(tl.int32)
        else:
            in_segment = value != 0
        counts = inside_image
        if HAS_VALID:
            image = tl.load(images + mask).to(tl.int64) * height * width
            counts = counts & (tl.load(valid + image + pixel, mask=inside_image, other=0) != 0)
        sign = tl.where(in_segment, -1.0, 1.0)
        signed = logit * sign
        exponential = tl.exp(-tl.abs(signed))
        error = tl.where(signed >= 0, 1.0, exponential) / (1 + exponential)
        cross_entropy = tl.maximum(signed, 0.0) + tl.log(1 + exponential)
        zero = tl.zeros_like(signed)
        return tl.where(counts, sign, zero), tl.where(counts, error, zero), tl.where(counts, cross_entropy, zero)

    @triton.jit(do_not_specialize=SIZES)
    def _sums_kernel(
        logits, masks, valid, sources, images, segments, out, h, w, height, width, step_y, step_x, asymmetry,
        IS_INDEX_MAP: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    ):  # fmt: skip
        mask, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        focal = tl.zeros((BLOCK,), tl.float32)
        masked_error = tl.zeros((BLOCK,), tl.float32)
        signed_error = tl.zeros((BLOCK,), tl.float32)
        signs = tl.zeros((BLOCK,), tl.float32)
        pixels = tl.zeros((BLOCK,), tl.float32)
        for repeat in range(REPEATS):
            pixel = (block * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)
            sign, error, cross_entropy = _pixel(
                logits, masks, valid, sources, images, segments, mask, pixel, h, w, height, width, step_y, step_x,
                IS_INDEX_MAP, HAS_VALID,
            )  # fmt: skip
            focal += 0.5 * (1 + asymmetry * sign) * error * error * cross_entropy
            masked_error += error
            signed_error += error * sign
            signs += sign
            pixels += sign * sign
        place = out + mask.to(tl.int64) * 5 * blocks + block
        tl.store(place, tl.sum(focal, 0))
        tl.store(place + blocks, tl.sum(masked_error, 0))
        tl.store(place + 2 * blocks, tl.sum(signed_error, 0))
        tl.store(place + 3 * blocks, tl.sum(signs, 0))
        tl.store(place + 4 * blocks, tl.sum(pixels, 0))

    @triton.jit(do_not_specialize=SIZES)
    def _gradient_kernel(
        logits, masks, valid, sources, images, segments, slopes, out, h, w, height, width, step_y, step_x, asymmetry,
        IS_INDEX_MAP: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        mask, masks_in_all = tl.program_id(0), tl.num_programs(0)
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sign, error, cross_entropy = _pixel(
            logits, masks, valid, sources, images, segments, mask, pixel, h, w, height, width, step_y, step_x,
            IS_INDEX_MAP, HAS_VALID,
        )  # fmt: skip
        focal, constant = tl.load(slopes + mask), tl.load(slopes + masks_in_all + mask)
        by_sign = tl.load(slopes + 2 * masks_in_all + mask)
        of_error = error - error * error
        of_focal = (cross_entropy * of_error + 0.5 * error * error) * error * focal * (sign + asymmetry)
        gradient = of_focal + of_error * (by_sign + constant * sign)
        tl.store(out + mask.to(tl.int64) * height * width + pixel, gradient, mask=pixel < height * width)


class FusedPixels:
    """The pixels of masks (T, h, w), all arguments as of `losses.paired_losses`, `sources` (T,) where in
    `targets.masks` they are.
    """

    def __init__(self, logits: Tensor, targets: Any, sources: Tensor, image: Tensor, segment: Tensor):
        self.number, *cells = logits.shape
        self.size = targets.masks.shape[-2:]
        height, width = self.size
        valid = targets.valid_mask
        masks = targets.masks if targets.is_index_map else targets.masks.view(torch.uint8)
        self.inputs = (
            logits.contiguous(), masks.contiguous(), masks if valid is None else valid.contiguous().view(torch.uint8),
            sources, image, segment,
        )  # fmt: skip
        self.sizes = (*cells, height, width, cells[0] / height, cells[1] / width)
        self.options = {"IS_INDEX_MAP": targets.is_index_map, "HAS_VALID": valid is not None, "BLOCK": BLOCK}

    def loss_sums(self, asymmetry: float) -> Tensor:
        """(5, T), see `_MaskChunks.loss_sums`."""
        blocks = triton.cdiv(self.size[0] * self.size[1], BLOCK * REPEATS)
        out = torch.empty(self.number, 5, blocks, device=self.inputs[0].device)
        options = self.options | {"REPEATS": REPEATS}
        with torch.cuda.device_of(out):
            _sums_kernel[(self.number, blocks)](*self.inputs, out, *self.sizes, asymmetry, **options)
        return out.sum(2).T

    def gradient(self, slopes: Tensor, asymmetry: float) -> Tensor:
        """Derivatives by the upsampled logits (T, H, W); slopes (3, T), see `_MaskChunks.gradient`."""
        out = torch.empty(self.number, *self.size, device=slopes.device)
        grid = (self.number, triton.cdiv(out[0].numel(), BLOCK))
        with torch.cuda.device_of(out):
            _gradient_kernel[grid](*self.inputs, slopes.contiguous(), out, *self.sizes, asymmetry, **self.options)
        return out


_works = triton is not None


def can_fuse(logits: Tensor) -> bool:
    """Whether the kernels run for these logits: not on a CPU, not in float64, not of no masks, not after a failure."""
    return _works and logits.device.type == "cuda" and logits.dtype != torch.float64 and len(logits) > 0


def give_up(error: Exception) -> None:
    """After a failure nothing is fused any more in this process; lack of memory is none."""
    global _works
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _works = False
    logger.warning(f"Triton could not compile or run the kernels of the losses, which are slower without: {error!r}")

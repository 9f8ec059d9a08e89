"""The loss: Eq. (1) of the paper over all decoder layers, its options, and the per-pixel loss of the baselines.

A loss is a class, made of the configuration and its options, with `loss(predictions, targets, assignment) -> sums`: a
sum over images for each layer (L,), or one of all (). It names its `normalizer`, the one of `LossNormalizers` that sums
are divided by. Ours have several terms, {name: sums}, and the `weights` of them; that of a loss which
`maskcls_hf.register_loss` adds is in `config.losses`. Shape legend: see matching.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .configuration_maskcls import LOSSES, MATCHERS, custom_file
from .fused_losses import FusedPixels, can_fuse, give_up
from .matching import (
    FOCAL_ALPHA,
    ONE_TO_ONE,
    Assignment,
    PaddedTargets,
    Predictions,
    box_distances,
    chunk_bytes,
    dice_coefficient,
    for_each_chunk,
    full_dtype,
    has_box,
    prepare_targets,
    slices,
    to_device,
)
from .options import as_labels, integers
from .point_sampling import PointSampler, has_valid_pixels, logits_at
from .resampling import bilinear_matrix
from .transformer_decoders import PixelLogits, SegmentLogits, layer_suffix

# Pixels of a mask at a time on a CPU: a small tile depends on few cells, which keeps the matrices small.
CPU_TILE = (128, 128)
PQ_ALPHA = 0.75  # share of the matched pairs in the PQ-style loss
TEMPERATURE = 0.3  # of the instance discrimination; both as in Max-DeepLab


class MaskClsCriterion:
    """Class loss and mask losses of matched probability-mask pairs (paper Eq. 1), for every decoder layer.

    It holds no tensors. `criterion(layers, mask_labels, class_labels, pixel_mask)` gives the unweighted terms
    `loss_cross_entropy`, `loss_mask` (focal), `loss_dice` of the deepest layer and `..._0`, `..._1` of the inner
    ones; `criterion.total(terms)` is their weighted sum. Everything is computed in float32. Of layers with boxes there
    are `loss_bbox` (L1) and `loss_giou` too, and where their weights are above 0 the losses of Max-DeepLab: `loss_pq`,
    `loss_mask_id`, and without layers `loss_instance_discrimination` and `loss_semantic`.

    The terms of masks and boxes are divided by the number of ground-truth segments, the class term by the sum of its
    class weights, those of Max-DeepLab by the number of images; all over the whole step. In training, counts are summed
    over processes and divided by their number, so that averaged gradients are those of one process with the union of
    the batches. With `num_items_in_batch` (see `count_items`) they are the counts of a step with several accumulated
    batches.
    """

    def __init__(self, config):
        self.matcher = MATCHERS.build(config, "matching")
        self.num_labels = config.num_labels
        self.no_object_weight = config.no_object_weight
        self.losses = {name: loss(config) for name, loss in BUILT_IN.items()}
        self.weights = {name: weight for loss in self.losses.values() for name, weight in loss.weights.items()}
        for name, weight in config.losses.items():
            self.losses[name] = self.further_loss(config, name)
            self.weights[f"loss_{name}"] = weight

    def __call__(
        self,
        layers: list[SegmentLogits],
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        pixel_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        image_sizes: Tensor | None = None,
        pixels: PixelLogits | None = None,
        padded_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            layers: class logits (B, N, K + 1), mask logits (B, N, h, w) and, with a box head, boxes (B, N, 4) of each
                layer, deepest last.
            mask_labels: for each image a stack of masks (M, H, W), bool or 0/1; or, where segments do not overlap, a
                map of integers (H, W), the place of each pixel's segment in class_labels and -1 in none. Smaller
                ones are padded with nothing.
            class_labels: B vectors (M,) of classes in 0..K-1.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*):
                Non-zero where a pixel counts in matching and loss; None: all do, also void and padding, which are
                then negatives, as in the paper's code.
            num_items_in_batch: what `count_items` gives for all batches of a step; None: this batch is the step.
            image_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): height and width of each image without
                padding, to which boxes are relative; None: those of its labels.
            pixels: what `SegmentationModule.pixel_outputs` gives, for `loss_instance_discrimination` and
                `loss_semantic`.
            padded_size: height and width of the network's input. Masks then have this size, or that of their image
                without padding. None: the largest of the labels; not checked.

        Raises:
            `ValueError`: labels that do not fit each other or the logits; NaN or infinite costs.
        """
        device, batch = layers[0].class_logits.device, layers[0].class_logits.shape[0]
        if not hasattr(mask_labels, "__len__") or not hasattr(class_labels, "__len__"):
            raise ValueError("mask_labels and class_labels must be lists of a tensor for each image.")
        if not batch == len(mask_labels) == len(class_labels):
            raise ValueError(
                f"{batch} images, but {len(mask_labels)} mask_labels and {len(class_labels)} class_labels."
            )
        with torch.autocast(device.type, enabled=False):
            targets = prepare_targets(
                mask_labels, class_labels, self.num_labels, device, pixel_mask, image_sizes, padded_size
            )
            predictions = Predictions.of_layers(layers, pixels)
            normalizers = self.normalizers(predictions, targets, num_items_in_batch)
            assignment = self.matcher(predictions, targets)
            terms: dict[str, Tensor] = {}
            for loss_name, loss in self.losses.items():
                sums_of_terms = loss(predictions, targets, assignment)
                if isinstance(sums_of_terms, Tensor):
                    sums_of_terms = {f"loss_{loss_name}": sums_of_terms}
                for name, sums in sums_of_terms.items():
                    values = sums / getattr(normalizers, loss.normalizer)
                    if values.ndim:
                        terms |= {f"{name}{layer_suffix(i, len(values))}": term for i, term in enumerate(values)}
                    else:
                        terms[name] = values
        return terms

    def further_loss(self, config: Any, name: str) -> Any:
        """One that `config.losses` names."""
        if f"loss_{name}" in self.weights or name in BUILT_IN:
            raise ValueError(f"losses: {name!r} is there already, and its weight is a field of the configuration.")
        options = config.loss_options.get(name, {})
        loss = LOSSES.make(name, (config,), options, "losses", custom_file(config, LOSSES.kind, name))
        if getattr(loss, "normalizer", None) not in LossNormalizers._fields:
            raise ValueError(f"loss {name!r} must have a `normalizer`, one of {LossNormalizers._fields}.")
        return loss

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of all terms (Eq. 1 with lambda_focal, lambda_dice)."""
        of_layers: dict[str, list[Tensor]] = {}
        for name, term in terms.items():
            base, _, layer = name.rpartition("_")
            of_layers.setdefault(name if name in self.weights or not layer.isdigit() else base, []).append(term)
        return torch.stack([self.weights[name] * torch.stack(terms).sum() for name, terms in of_layers.items()]).sum()

    def normalizers(
        self, predictions: Predictions, targets: PaddedTargets, num_items_in_batch: Tensor | int | None
    ) -> "LossNormalizers":
        num_queries, device = predictions.class_logits.shape[2], predictions.class_logits.device
        counts = count_items(targets.numbers, num_queries)  # on the CPU: dividing by numbers needs no transfer
        processes = 1
        if num_items_in_batch is not None:
            given = torch.as_tensor(num_items_in_batch, dtype=counts.dtype)
            if given.device.type != "cpu":
                given, counts = given.to(device), to_device(counts, device)
            # A bare number of segments, as Trainer counts items: the rest in the proportion of this batch.
            counts = given if given.numel() == 3 else counts * given / counts[0].clamp(min=1)
        elif torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            counts = to_device(counts, device)
            dist.all_reduce(counts)
            processes = dist.get_world_size()
            counts = counts / processes
        segments, matched, images = counts
        class_weight = matched + (images * num_queries - matched) * self.no_object_weight
        tiny = torch.finfo(counts.dtype).tiny  # no-object weight 0 and nothing matched: 0 / tiny = 0
        return LossNormalizers(segments.clamp(min=1 / processes), class_weight.clamp(min=tiny), images)


class LossNormalizers(NamedTuple):
    """What the terms of the loss are divided by, over the whole step; each ()."""

    segments: Tensor
    class_weight: Tensor
    images: Tensor


def count_items(class_labels: list[Any], num_queries: int) -> Tensor:
    """What the loss of a step is divided by: segments, matched segments (at most N an image), images: (3,) float32.

    Summed over the batches that one optimizer step accumulates (and over processes, if the loss is multiplied by
    their number, as Trainer does), it is `num_items_in_batch`.

    Args:
        class_labels: of each image (M,), or M.
    """
    numbers = [labels if isinstance(labels, int) else len(labels) for labels in class_labels]
    counts = [sum(numbers), sum(min(number, num_queries) for number in numbers), len(numbers)]
    return torch.tensor(counts, dtype=torch.float32, device="cpu")


def sum_by_layer(values: Tensor, assignment: Assignment, layers: int) -> Tensor:
    """(T,) -> (L,)."""
    return values.new_zeros(layers).index_add(0, assignment.layer, values)


# ---- Eq. (1) ----


class ClassLoss:
    """Weighted cross-entropies of all queries; unmatched ones should say "no object"."""

    normalizer = "class_weight"

    def __init__(self, config):
        self.weights = {"loss_cross_entropy": config.cross_entropy_weight}
        self.no_object_weight = config.no_object_weight

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        logits = predictions.class_logits
        layer, image, query, segment = assignment
        no_object = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:3], no_object, device=logits.device)  # (B, L, N)
        wanted[image, layer, query] = targets.labels[image, segment]
        losses = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
        weights = torch.ones_like(losses).masked_fill_(wanted == no_object, self.no_object_weight)
        return {"loss_cross_entropy": (losses * weights).sum((0, 2))}


class MaskLoss:
    """Focal loss or cross-entropy (`config.mask_loss`) and dice loss of the matched masks, at the resolution of the
    targets, or at points (`config.loss_points`)."""

    normalizer = "segments"

    def __init__(self, config):
        self.weights = {"loss_mask": config.mask_weight, "loss_dice": config.dice_weight}
        self.is_focal = config.mask_loss == "focal"
        self.sampler = PointSampler.of(config)
        self.one_to_one = config.matching in ONE_TO_ONE

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        layers, queries = predictions.class_logits.shape[1:3]
        _, image, _, segment = assignment
        most = min(queries, max(targets.numbers, default=0)) if self.one_to_one else None
        matched = predictions.matched_masks(assignment, most)  # (T, h, w)
        if self.sampler is None:
            of_mask, dice = paired_losses(matched, targets, image, segment, self.is_focal)
        else:
            of_mask, dice = _PointLosses.apply(  # type: ignore[no-untyped-call]
                matched, targets, image, segment, self.sampler, self.is_focal
            )
        return {
            "loss_mask": sum_by_layer(of_mask, assignment, layers),
            "loss_dice": sum_by_layer(dice, assignment, layers),
        }


class _PointLosses(torch.autograd.Function):
    """The losses at points of T masks, some masks at a time; of the points nothing is kept but the derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: PaddedTargets,
        image: Tensor,
        segment: Tensor,
        sampler: PointSampler,
        is_focal: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = full_dtype(logits.dtype)
        losses = logits.new_empty(2, len(logits), dtype=dtype)
        slopes = logits.new_empty(2, *logits.shape) if ctx.needs_input_grad[0] else None
        bytes_of_mask = dtype.itemsize * (6 * sampler.candidates + 2 * logits[:1].numel())
        for part in slices(len(logits), max(1, chunk_bytes(logits.device) // bytes_of_mask)):
            of_part = logits[part].detach().to(dtype).requires_grad_(slopes is not None)
            points, labels = sampler.of_pairs(of_part.detach(), image[part], segment[part], targets)
            with torch.enable_grad():
                at_points = logits_at(of_part[:, None], points, sampler.padding_mode)[:, 0]
                counts = has_valid_pixels(targets, image[part])
                found = [loss * counts for loss in point_losses(at_points, labels, is_focal)]
                sums = [loss.sum() for loss in found]
            losses[:, part] = torch.stack(found).detach()
            if slopes is not None:
                for number, total in enumerate(sums):
                    (slopes[number, part],) = torch.autograd.grad(total, of_part, retain_graph=number == 0)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses[0], losses[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mask: Tensor, of_dice: Tensor) -> tuple:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        weights = torch.stack([of_mask, of_dice]).to(slopes.dtype)
        return (slopes * weights[:, :, None, None]).sum(0), None, None, None, None, None


def point_losses(logits: Tensor, labels: Tensor, is_focal: bool) -> tuple[Tensor, Tensor]:
    """Focal loss or cross-entropy (mean over points) and dice loss of masks (T, P) with segments (T, P) in 0..1."""
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if is_focal:
        error = probability + labels - 2 * probability * labels
        cross_entropy = cross_entropy * error.square() * (1 - FOCAL_ALPHA + (2 * FOCAL_ALPHA - 1) * labels)
    overlap, areas = (probability * labels).sum(1), probability.sum(1) + labels.sum(1)
    return cross_entropy.mean(1), 1 - (2 * overlap + 1) / (areas + 1)


def paired_losses(
    logits: Tensor, targets: PaddedTargets, image: Tensor, segment: Tensor, is_focal: bool = True
) -> tuple[Tensor, Tensor]:
    """Focal loss (RetinaNet, Eq. 5) or cross-entropy (mean over pixels) and dice loss (V-Net; 1 added to both parts as
    in the paper's code) of T masks with their segments, at the resolution of the segments.

    Args:
        logits (`torch.Tensor` of shape `(T, h, w)`): of any float type; upsampled bilinearly to (H, W).
        image (`torch.Tensor` of shape `(T,)`): the image of each.
        segment (`torch.Tensor` of shape `(T,)`): the number of its segment in the image.

    Returns:
        focal loss or cross-entropy, and dice loss, (T,) each, float32 (float64 of float64).
    """
    return _PairedLosses.apply(logits, targets, image, segment, is_focal)  # type: ignore[no-untyped-call, return-value]


class _PairedLosses(torch.autograd.Function):
    """The losses in chunks of masks, and so the gradient: of the full resolution nothing is kept.

    With the sign of a pixel, -1 inside of the segment and 1 outside, and its signed logit x, 1 - p_t is sigmoid(x) and
    the cross-entropy softplus(x). Pixels that are not valid have the sign 0 and an x that makes both 0.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: PaddedTargets, image: Tensor, segment: Tensor, is_focal: bool
    ) -> tuple[Tensor, Tensor]:
        sums = _MaskChunks(logits, targets, image, segment, is_focal).loss_sums()
        focal, masked_error, signed_error, signs, pixels = sums
        # Sum of p and of the target, plus 1: area = (pixels - signs) / 2, error inside = (masked - signed error) / 2.
        union = (pixels - signs) + signed_error + 1
        pixels = pixels.clamp(min=1)
        dice = masked_error / union  # 1 - (2 * overlap + 1) / union
        ctx.save_for_backward(logits, image, segment, pixels, union, dice)
        ctx.targets, ctx.is_focal = targets, is_focal
        return focal / pixels, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal: Tensor, dice: Tensor) -> tuple:  # type: ignore[override]
        logits, image, segment, pixels, union, value = ctx.saved_tensors
        of_error = dice / union
        slopes = torch.stack([focal / pixels, of_error, -of_error * value])
        chunks = _MaskChunks(logits, ctx.targets, image, segment, ctx.is_focal)
        return chunks.gradient(slopes), None, None, None, None


class _MaskChunks:
    """Matched masks and their segments, some of them at a time, and of those a tile at a time.

    Args: as of `paired_losses`.
    """

    def __init__(self, logits: Tensor, targets: PaddedTargets, image: Tensor, segment: Tensor, is_focal: bool):
        self.logits, self.targets, self.image, self.segment = logits, targets, image, segment
        self.is_focal = is_focal
        self.dtype = full_dtype(logits.dtype)
        size = targets.masks.shape[-2:]
        largest_tile = CPU_TILE if logits.device.type == "cpu" else size
        self.tile = [min(length, most) for length, most in zip(size, largest_tile, strict=True)]
        # Four buffers and a temporary of a tile; of all pixels masks, signs and valid ones, a byte each.
        bytes_of_mask = 5 * self.dtype.itemsize * math.prod(self.tile) + 4 * math.prod(size)
        self.parts = slices(len(logits), max(1, chunk_bytes(logits.device) // bytes_of_mask))

    @cached_property
    def rows(self) -> "list[_Strip]":
        return _strips(self.targets.masks.shape[1], self.tile[0], self.logits.shape[1], self.logits, self.dtype)

    @cached_property
    def columns(self) -> "list[_Strip]":
        return _strips(self.targets.masks.shape[2], self.tile[1], self.logits.shape[2], self.logits, self.dtype)

    def loss_sums(self) -> Tensor:
        """What the losses of T masks are made of: sums over pixels (5, T) of the focal loss, of the error 1 - p_t, of
        the error times the sign, of the sign, and of one."""
        if self.is_focal and can_fuse(self.logits):
            try:
                return self._fused(slice(None)).loss_sums(1 - 2 * FOCAL_ALPHA)
            except Exception as failure:
                give_up(failure)
        sums = self.logits.new_empty(5, len(self.logits), dtype=self.dtype)
        self._for_each_part(lambda part: self._write_sums(part, sums[:, part]))
        return sums

    def gradient(self, slopes: Tensor) -> Tensor:
        """Derivatives of the losses by the logits (T, h, w), from those by the sums (3, T): of focal, and the constant
        part and that times the sign in the derivative by the error."""
        gradient = torch.empty_like(self.logits)
        self._for_each_part(lambda part: gradient[part].copy_(self._gradient(part, slopes[:, part])))
        return gradient

    def _for_each_part(self, function: Callable[[slice], Any]) -> None:
        for_each_chunk(function, self.parts, self.logits.device)

    def _write_sums(self, part: slice, sums: Tensor) -> None:
        signs, invalid = self._signs(part)
        sums[:3] = 0
        sums[3] = signs.sum((1, 2))
        sums[4] = math.prod(signs.shape[1:]) if invalid is None else math.prod(signs.shape[1:]) + invalid.sum((1, 2))
        for _, _, buffers in self._tiles(part, signs, invalid):
            signed, sign, error, cross_entropy = buffers
            torch.sigmoid(signed, out=error)
            torch.ops.aten.softplus.out(signed, out=cross_entropy)
            masked_error = error.sum((1, 2))
            signed_error = torch.mul(error, sign, out=signed).sum((1, 2))
            if self.is_focal:
                error.mul_(error).mul_(cross_entropy)
                of_pixels = torch.addcmul(error, error, sign, value=1 - 2 * FOCAL_ALPHA, out=signed).mul_(0.5)
            else:
                of_pixels = cross_entropy
            sums[:3] += torch.stack([of_pixels.sum((1, 2)), masked_error, signed_error])

    def _fused(self, part: slice) -> FusedPixels:
        image, segment = self.image[part], self.segment[part]
        sources = image if self.targets.is_index_map else self.targets.rows[image, segment]
        return FusedPixels(self.logits[part], self.targets, sources, image, segment)

    def _gradient(self, part: slice, slopes: Tensor) -> Tensor:
        if self.is_focal and can_fuse(self.logits):
            try:
                of_pixels = self._fused(part).gradient(slopes, 1 - 2 * FOCAL_ALPHA)
                return self.rows[0].matrix.T @ (of_pixels @ self.columns[0].matrix)
            except Exception as failure:
                give_up(failure)
        signs, invalid = self._signs(part)
        focal, constant, by_sign = slopes[:, :, None, None]
        asymmetry = focal * (1 - 2 * FOCAL_ALPHA)
        gradient = torch.zeros_like(self.logits[part], dtype=self.dtype)
        for row, column, buffers in self._tiles(part, signs, invalid):
            signed, sign, error, cross_entropy = buffers
            torch.sigmoid(signed, out=error)
            torch.ops.aten.softplus.out(signed, out=cross_entropy)
            of_error = torch.addcmul(error, error, error, value=-1, out=signed)  # derivative of the error
            if self.is_focal:
                # Half of that of error^2 * cross_entropy, then weighted by 2 * alpha_t * sign.
                of_mask = cross_entropy.mul_(of_error).addcmul_(error, error, value=0.5).mul_(error)
                of_mask.mul_(torch.addcmul(asymmetry, focal, sign, out=error))
            else:
                of_mask = torch.mul(error, focal, out=cross_entropy).mul_(sign)
            of_mask.addcmul_(of_error, torch.addcmul(by_sign, constant, sign, out=error))
            gradient[:, row.cells, column.cells] += row.matrix.T @ (of_mask @ column.matrix)
        return gradient

    def _signs(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """-1 inside of the segments, 1 outside, 0 where a pixel is not valid; and -1 there, else 0: (n, H, W) int8."""
        masks = self.targets.masks_of(self.image[part], self.segment[part])
        signs = torch.rsub(masks.view(torch.int8), 1, alpha=2)
        if self.targets.valid_mask is None:
            return signs, None
        valid = self.targets.valid_mask.index_select(0, self.image[part]).view(torch.int8)
        return signs.mul_(valid), valid.sub_(1)

    def _tiles(
        self, part: slice, signs: Tensor, invalid: Tensor | None
    ) -> "Iterator[tuple[_Strip, _Strip, list[Tensor]]]":
        """Rows and columns of each tile, and four buffers (n, y, x): signed logits, signs, and two that are free."""
        logits = self.logits[part].to(self.dtype)
        is_whole = len(self.rows) == len(self.columns) == 1
        space = logits.new_empty(3 if is_whole else 4, len(logits) * math.prod(self.tile))
        for row, column in itertools.product(self.rows, self.columns):
            sign = signs[:, row.pixels, column.pixels]
            buffers = [buffer[: sign.numel()].view(sign.shape) for buffer in space]
            if is_whole:
                upsampled = F.interpolate(logits[None], size=sign.shape[1:], mode="bilinear", align_corners=False)
                buffers.insert(0, upsampled[0])
            else:
                along_columns = logits[:, row.cells, column.cells] @ column.matrix.T
                torch.matmul(row.matrix, along_columns, out=buffers[0])
            buffers[0].mul_(buffers[1].copy_(sign))
            if invalid is not None:
                # Far enough below 0 for float32 to give 0 in both sigmoid and softplus.
                buffers[0].add_(buffers[2].copy_(invalid[:, row.pixels, column.pixels]), alpha=128)
            yield row, column, buffers


class _Strip(NamedTuple):
    """Some pixels of one axis, and the cells between which they are interpolated."""

    pixels: slice
    cells: slice
    matrix: Tensor  # (pixels, cells); transposed, it carries gradients back


def _strips(pixels: int, of_strip: int, cells: int, like: Tensor, dtype: torch.dtype) -> list[_Strip]:
    """Bilinear interpolation along one axis, edges as in `align_corners=False`, in strips of `of_strip` pixels."""
    matrix = bilinear_matrix(cells, pixels, dtype, like.device)
    strips = []
    for start in range(0, pixels, of_strip):
        inside = slice(start, min(start + of_strip, pixels))
        # A pixel's cells lie around its center; at the borders of the map there are fewer.
        first = max(0, math.floor((inside.start + 0.5) * cells / pixels - 0.5))
        last = min(cells, math.floor((inside.stop - 0.5) * cells / pixels - 0.5) + 2)
        strips.append(_Strip(inside, slice(first, last), matrix[inside, first:last]))
    return strips


class BoxLoss:
    """L1 distance and 1 - GIoU of the matched boxes (DETR); a segment without valid pixels adds nothing."""

    normalizer = "segments"

    def __init__(self, config):
        self.weights = {"loss_bbox": config.box_weight, "loss_giou": config.giou_weight}

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        if predictions.boxes is None:
            return {}
        layer, image, query, segment = assignment
        wanted = targets.boxes[image, segment]  # (T, 4)
        distance, giou = box_distances(predictions.boxes[image, layer, query], wanted)
        known, layers = has_box(wanted), predictions.boxes.shape[1]
        return {
            "loss_bbox": sum_by_layer(distance * known, assignment, layers),
            "loss_giou": sum_by_layer(giou * known, assignment, layers),
        }


# ---- Max-DeepLab (Wang et al., MaX-DeepLab, CVPR 2021): PQ-style loss and auxiliary losses, at the resolution of the
# mask logits as in its code. The targets are those at the centers of the cells: borders are then right without the
# losses of Eq. (1). Masks (B, M, P) are False where pixels are not valid. ----


class PQStyleLoss:
    """See [`pq_style_loss`]."""

    normalizer = "images"

    def __init__(self, config):
        self.weights = {"loss_pq": config.pq_weight}

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        if not self.weights["loss_pq"]:
            return {}
        masks, valid = targets.resampled(predictions.mask_logits.shape[-2:], at_centers=True)
        mask_logits = predictions.mask_logits.flatten(3)
        return {
            "loss_pq": pq_style_loss(predictions.class_logits, mask_logits, masks, targets.labels, valid, assignment)
        }


class MaskIdLoss:
    """See [`mask_id_loss`]."""

    normalizer = "images"

    def __init__(self, config):
        self.weights = {"loss_mask_id": config.mask_id_weight}
        self.exclusive_masks = config.exclusive_masks

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        if not self.weights["loss_mask_id"]:
            return {}
        masks, _ = targets.resampled(predictions.mask_logits.shape[-2:], at_centers=True)
        logits = predictions.mask_logits.flatten(3).float()
        log_p = F.logsigmoid(logits) if self.exclusive_masks else logits.log_softmax(2)
        return {"loss_mask_id": mask_id_loss(log_p, masks, assignment).sum(0)}


class InstanceDiscriminationLoss:
    """See [`instance_discrimination_loss`]."""

    normalizer = "images"

    def __init__(self, config):
        self.weights = {"loss_instance_discrimination": config.instance_discrimination_weight}

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        if not self.weights["loss_instance_discrimination"]:
            return {}
        needed = "instance_discrimination_weight needs per-pixel embeddings"
        embeddings = _checked_pixels(predictions.pixels.embeddings, needed)
        masks, _ = targets.resampled(embeddings.shape[-2:], at_centers=True)
        return {"loss_instance_discrimination": instance_discrimination_loss(embeddings.flatten(2), masks).sum()}


class SemanticLoss:
    """See [`semantic_loss`]."""

    normalizer = "images"

    def __init__(self, config):
        self.weights = {"loss_semantic": config.semantic_weight}

    def __call__(self, predictions: Predictions, targets: PaddedTargets, assignment: Assignment) -> dict[str, Tensor]:
        if not self.weights["loss_semantic"]:
            return {}
        logits = _checked_pixels(predictions.pixels.semantic_logits, "semantic_weight needs semantic logits")
        masks, _ = targets.resampled(logits.shape[-2:], at_centers=True)
        return {"loss_semantic": semantic_loss(logits.flatten(2), masks, targets.labels).sum()}


def _checked_pixels(maps: Tensor | None, needed: str) -> Tensor:
    """(B, C, h, w) as float32; `ValueError` where there are none."""
    if maps is None:
        raise ValueError(f"{needed}, which the model does not give: make or load it with this weight above 0.")
    return maps.float()


def pq_style_loss(
    class_logits: Tensor, mask_logits: Tensor, masks: Tensor, labels: Tensor, valid: Tensor, assignment: Assignment
) -> Tensor:
    """PQ_ALPHA * (sum over matched pairs of p(c) * -Dice + Dice * -log p(c)) + (1 - PQ_ALPHA) * (sum over unmatched
    queries of -log p(no object)), divided by N: a mean over the queries, as in Max-DeepLab's code; summed over images.

    The first factor of each product has no gradient: the gradient is that of -p(c) * Dice with a cross-entropy in
    place of the probability. The loss may be negative.

    Args:
        class_logits: (B, L, N, K + 1), "no object" last.
        mask_logits: (B, L, N, P).
        masks: (B, M, P) bool.
        labels: (B, M).
        valid: (B, P) bool.

    Returns:
        (L,)
    """
    layer, image, query, segment = assignment
    layers, queries = class_logits.shape[1:3]
    log_p = class_logits.log_softmax(-1)
    of_class = log_p[image, layer, query, labels[image, segment]]  # (T,)
    wanted = masks[image, segment]  # (T, P)
    matched = mask_logits[image, layer, query].to(log_p.dtype).sigmoid() * valid[image]  # (T, P)
    quality = dice_coefficient((matched * wanted).sum(1), matched.sum(1) + wanted.sum(1))
    positive = -(of_class.exp().detach() * quality + quality.detach() * of_class)
    unmatched = torch.ones_like(log_p[..., -1])  # (B, L, N)
    unmatched[image, layer, query] = 0
    negative = -(unmatched * log_p[..., -1]).sum((0, 2))
    return (PQ_ALPHA * sum_by_layer(positive, assignment, layers) + (1 - PQ_ALPHA) * negative) / queries


def instance_discrimination_loss(embeddings: Tensor, masks: Tensor) -> Tensor:
    """Contrast of the segments of an image: each pixel's embedding should be nearest to that of its own segment, the
    sum of the embeddings inside, both normalized. Cross-entropy over the segments of the cosines / TEMPERATURE, a mean
    over the pixels inside segments.

    Args:
        embeddings: (B, C, P), in any length.
        masks: (B, M, P) bool.

    Returns:
        (B,)
    """
    pixels = F.normalize(embeddings, dim=1)
    segments = F.normalize(masks.to(pixels.dtype) @ pixels.transpose(1, 2), dim=2)  # (B, M, C)
    cosines = segments @ pixels  # (B, M, P)
    absent = ~masks.any(2, keepdim=True)  # smaller than a cell, void, or none
    logits = (cosines / TEMPERATURE).masked_fill(absent, torch.finfo(cosines.dtype).min)
    return membership_loss(logits.log_softmax(1), masks)


def mask_id_loss(log_probabilities: Tensor, masks: Tensor, assignment: Assignment) -> Tensor:
    """Cross-entropy over the N masks at each pixel with the query that its segment is matched with, a mean over the
    pixels inside matched segments.

    Args:
        log_probabilities: (B, L, N, P), of each mask at each pixel.
        masks: (B, M, P) bool.

    Returns:
        (B, L)
    """
    layer, image, query, segment = assignment
    images, layers = log_probabilities.shape[:2]
    of_segment = layer.new_zeros(images, layers, masks.shape[1])  # query of each
    of_segment[image, layer, segment] = query
    is_matched = torch.zeros_like(of_segment, dtype=torch.bool)
    is_matched[image, layer, segment] = True
    index = of_segment[..., None].expand(-1, -1, -1, log_probabilities.shape[3])
    return membership_loss(log_probabilities.gather(2, index), masks[:, None] & is_matched[..., None])


def semantic_loss(logits: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the classes (B, K, P) at each pixel, a mean over the pixels inside the segments (B, M, P) bool
    of the classes (B, M): (B,)."""
    of_class = F.one_hot(labels, logits.shape[1]).to(logits.dtype).transpose(1, 2)  # (B, K, M)
    return membership_loss(logits.log_softmax(1), of_class @ masks.to(logits.dtype) > 0)


def membership_loss(log_probabilities: Tensor, members: Tensor) -> Tensor:
    """Mean over the pixels with a member of -log of the members' probability, from (..., S, P) and (..., S, P) bool to
    (...). A pixel has one, unless segments overlap: then any of them is right."""
    if not members.shape[-2]:
        return log_probabilities.sum((-2, -1))  # zero, and still part of the graph
    inside = members.any(-2)
    outside = log_probabilities.masked_fill(~(members | ~inside.unsqueeze(-2)), float("-inf"))
    losses = -outside.logsumexp(-2) * inside
    return losses.sum(-1) / inside.sum(-1).clamp(min=1)


BUILT_IN: dict[str, Any] = {
    "class": ClassLoss,
    "mask": MaskLoss,
    "box": BoxLoss,
    "pq": PQStyleLoss,
    "mask_id": MaskIdLoss,
    "instance_discrimination": InstanceDiscriminationLoss,
    "semantic": SemanticLoss,
}
for _name, _loss in BUILT_IN.items():
    LOSSES.register(_name, _loss)


# ---- per-pixel baselines ----


def count_pixels(labels: Tensor, ignore_index: int) -> Tensor:
    """What the per-pixel loss of a step is divided by: labeled pixels, () float32; summed as `count_items`."""
    return (labels != ignore_index).sum().float()


def per_pixel_loss(logits: Tensor, labels: Tensor, ignore_index: int, pixels: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies of labeled pixels / `pixels` (None: their number), in float32.

    Logits (B, K, h, w) are upsampled to labels (B, H, W).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        losses = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
        return losses / (count_pixels(labels, ignore_index).clamp(min=1) if pixels is None else pixels)


def checked_pixel_labels(labels: Tensor, num_labels: int, ignore_index: int, shape: tuple[int, int, int]) -> Tensor:
    """Labels of a per-pixel model, of `shape` (B, H, W), as integers.

    Raises:
        `ValueError`: another shape, fractions, or labels outside of the
            classes (not looked for on other devices than the CPU, which would have to wait).
    """
    labels = integers(as_labels(labels, "labels"), "labels")
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels {tuple(labels.shape)} must be (B, H, W), {shape} as pixel_values.")
    known = labels[labels != ignore_index] if labels.device.type == "cpu" else labels[:0]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < num_labels:
        raise ValueError(
            f"labels from {int(known.min())} to {int(known.max())} do not fit num_labels={num_labels} (ignored: "
            f"{ignore_index}). Check label_offset and void_id of the image processor."
        )
    return labels


def pixels_of_step(labels: Tensor, ignore_index: int, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Divisor of the per-pixel loss: `num_items_in_batch`, the labeled pixels of a whole step; None: of this batch in
    all processes, over their number, as gradients are averaged."""
    if num_items_in_batch is not None:
        return torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=labels.device).clamp(min=1)
    pixels, processes = count_pixels(labels, ignore_index), 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(pixels)
        processes = dist.get_world_size()
    return pixels.clamp(min=1) / processes

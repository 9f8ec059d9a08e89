"""The loss: Eq. (1) of the paper over all decoder layers, and the per-pixel loss of the baselines."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .box_ops import box_losses, has_box
from .contracts import Assignment, PixelLogits, SegmentLogits, layer_suffix
from .label_tensors import as_labels, integers
from .mask_costs import paired_losses
from .matchers import MATCHERS, SegmentTargets
from .max_deeplab_losses import MaxDeepLabLosses


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
        self.weights = {
            "loss_cross_entropy": config.cross_entropy_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
            "loss_bbox": config.box_weight,
            "loss_giou": config.giou_weight,
        }
        self.max_deeplab = MaxDeepLabLosses(config)
        self.weights |= self.max_deeplab.weights

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
            pixels: what `SegmentationModule.of_pixels` gives, for `loss_instance_discrimination` and `loss_semantic`.
            padded_size: height and width of the network's input. Masks then have this size, or that of their image
                without padding. None: not checked.

        Raises:
            `ValueError`: labels that do not fit each other or the logits; NaN or infinite costs.
        """
        with torch.autocast(layers[0].mask_logits.device.type, enabled=False):
            layers = [layer.map(Tensor.float) for layer in layers]
            targets = self.collect(layers[0], mask_labels, class_labels, pixel_mask, image_sizes, padded_size)
            divisors = self.normalizers(layers[0], targets, num_items_in_batch)
            assignments_of_layers = self.matcher(layers, targets)
            terms: dict[str, Tensor] = {}
            for index, (layer, assignments) in enumerate(zip(layers, assignments_of_layers, strict=True)):
                suffix = layer_suffix(index, len(layers))
                focal, dice = self.mask_losses(layer.mask_logits, targets, assignments)
                classes = self.class_loss(layer.class_logits, targets, assignments)
                terms[f"loss_cross_entropy{suffix}"] = classes / divisors.class_weight
                terms[f"loss_mask{suffix}"] = focal / divisors.segments
                terms[f"loss_dice{suffix}"] = dice / divisors.segments
                if layer.boxes is not None:
                    distance, giou = self.box_losses(layer.boxes, targets, assignments)
                    terms[f"loss_bbox{suffix}"] = distance / divisors.segments
                    terms[f"loss_giou{suffix}"] = giou / divisors.segments
            others = self.max_deeplab(layers, pixels, targets, assignments_of_layers)
            terms |= {name: loss / divisors.images for name, loss in others.items()}
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of all terms (Eq. 1 with lambda_focal, lambda_dice)."""

        def without_layer(name: str) -> str:
            base, _, layer = name.rpartition("_")
            return base if layer.isdigit() else name

        return torch.stack([self.weights[without_layer(name)] * term for name, term in terms.items()]).sum()

    def class_loss(self, class_logits: Tensor, targets: SegmentTargets, assignments: list[Assignment]) -> Tensor:
        """Weighted sum of the cross-entropies of all queries; unmatched ones should say "no object"."""
        wanted = class_logits.new_full(class_logits.shape[:2], self.num_labels, dtype=torch.int64)  # (B, N)
        for image, (queries, segments) in enumerate(assignments):
            wanted[image, queries.to(wanted.device)] = targets.labels[image][segments.to(wanted.device)]
        losses = F.cross_entropy(class_logits.flatten(0, 1), wanted.flatten(), reduction="none")
        weights = torch.ones_like(losses).masked_fill(wanted.flatten() == self.num_labels, self.no_object_weight)
        return (losses * weights).sum()

    def mask_losses(
        self, mask_logits: Tensor, targets: SegmentTargets, assignments: list[Assignment]
    ) -> tuple[Tensor, Tensor]:
        """Sums of focal and dice loss over the matched pairs, at the resolution of the targets."""
        device = mask_logits.device
        images, queries = matched_queries(assignments, device)
        predicted = mask_logits[images, queries]  # (M, h, w), M over all images
        if not len(images):
            return predicted.sum(), predicted.sum()  # zero, and still part of the graph
        height, width = (max(pixels.shape[axis] for pixels in targets.masks) for axis in (-2, -1))
        padded = SegmentTargets(pad_to(targets.masks, height, width), targets.labels)
        wanted = torch.empty(len(images), height, width, dtype=torch.bool, device=device)
        of_images = wanted.split([len(a.segment_indices) for a in assignments])
        for image, (a, masks) in enumerate(zip(assignments, of_images, strict=True)):
            padded.write_chosen(image, a.segment_indices.to(device), masks)
        counted = None if targets.counted is None else targets.counted[images]
        focal, dice = paired_losses(predicted, wanted, counted)
        return focal.sum(), dice.sum()

    def box_losses(
        self, boxes: Tensor, targets: SegmentTargets, assignments: list[Assignment]
    ) -> tuple[Tensor, Tensor]:
        """Sums of L1 distance and 1 - GIoU over the matched pairs; a segment without counted pixels adds nothing."""
        chosen = zip(targets.boxes, assignments, strict=True)
        wanted = torch.cat([of_image[a.segment_indices.to(boxes.device)] for of_image, a in chosen])
        distance, giou = box_losses(boxes[matched_queries(assignments, boxes.device)], wanted)
        known = has_box(wanted)
        return (distance * known).sum(), (giou * known).sum()

    def normalizers(
        self, layer: SegmentLogits, targets: SegmentTargets, num_items_in_batch: Tensor | int | None
    ) -> "Divisors":
        num_queries = layer.class_logits.shape[1]
        counts = count_items(targets.labels, num_queries).to(layer.class_logits.device)
        processes = 1
        if num_items_in_batch is not None:
            given = torch.as_tensor(num_items_in_batch, dtype=counts.dtype, device=counts.device)
            # A bare number of segments, as Trainer counts items: the rest in the proportion of this batch.
            counts = given if given.numel() == 3 else counts * given / counts[0].clamp(min=1)
        elif torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            processes = dist.get_world_size()
        segments, matched, images = counts
        class_weight = matched + (images * num_queries - matched) * self.no_object_weight
        tiny = torch.finfo(counts.dtype).tiny  # no-object weight 0 and nothing matched: 0 / tiny = 0
        return Divisors(*(count / processes for count in (segments.clamp(min=1), class_weight.clamp(min=tiny), images)))

    def collect(
        self,
        layer: SegmentLogits,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        pixel_mask: Tensor | None,
        image_sizes: Tensor | None,
        padded_size: tuple[int, int] | None = None,
    ) -> SegmentTargets:
        """Check the labels against the logits and each other; pad the masks to one size."""
        device, batch = layer.class_logits.device, layer.class_logits.shape[0]
        if not hasattr(mask_labels, "__len__") or not hasattr(class_labels, "__len__"):
            raise ValueError("mask_labels and class_labels must be lists of a tensor for each image.")
        if not batch == len(mask_labels) == len(class_labels):
            raise ValueError(
                f"{batch} images, but {len(mask_labels)} mask_labels and {len(class_labels)} class_labels."
            )
        mask_labels = [as_labels(masks, f"Image {i}: mask_labels") for i, masks in enumerate(mask_labels)]
        class_labels = [as_labels(labels, f"Image {i}: class_labels") for i, labels in enumerate(class_labels)]
        class_labels = [integers(labels, f"Image {i}: class_labels") for i, labels in enumerate(class_labels)]
        for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
            check_shapes(image, masks, labels)
            if masks.ndim == 3:
                check_inside(image, masks)
            if padded_size is not None:
                check_size(image, masks, padded_size, image_sizes)
            if labels.device.type == "cpu" and len(labels) and not 0 <= labels.min() <= labels.max() < self.num_labels:
                raise ValueError(
                    f"Image {image}: class_labels {sorted(set(labels.tolist()))} must lie in 0..{self.num_labels - 1}."
                )
        all_masks = [masks.to(device) if masks.ndim == 2 else masks.to(device) != 0 for masks in mask_labels]
        all_labels = [labels.to(device, torch.int64) for labels in class_labels]
        if image_sizes is None:
            image_sizes = torch.tensor([masks.shape[-2:] for masks in mask_labels], device=device)
        if pixel_mask is None:
            return SegmentTargets(all_masks, all_labels, image_sizes=image_sizes)
        if len(pixel_mask) != batch or any(
            full < part for m in all_masks for full, part in zip(pixel_mask.shape[1:], m.shape[-2:], strict=True)
        ):
            raise ValueError(
                f"pixel_mask {tuple(pixel_mask.shape)} does not cover {batch} images with labels of "
                f"{[tuple(m.shape[-2:]) for m in all_masks]} pixels."
            )
        counted = pixel_mask.to(device) != 0
        return SegmentTargets(pad_to(all_masks, *pixel_mask.shape[1:]), all_labels, counted, image_sizes)


class Divisors(NamedTuple):
    """What the terms of the loss are divided by, over the whole step."""

    segments: Tensor
    class_weight: Tensor
    images: Tensor


def matched_queries(assignments: list[Assignment], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and query of the matched pairs of all images (M,), (M,)."""
    images = torch.cat([torch.full_like(a.query_indices, i) for i, a in enumerate(assignments)])
    return images.to(device), torch.cat([a.query_indices for a in assignments]).to(device)


def check_shapes(image: int, masks: Tensor, labels: Tensor) -> None:
    """Raise `ValueError` unless labels (M,) belong to a stack (M, H, W) or to a map (H, W) of -1..M-1."""
    where = f"Image {image}: mask_labels {tuple(masks.shape)} and class_labels {tuple(labels.shape)}"
    if masks.ndim == 3 and labels.shape == masks.shape[:1]:
        return
    if masks.ndim != 2 or labels.ndim != 1:
        raise ValueError(f"{where} must be (M, H, W) and (M,) with the same M, or a map (H, W) and (M,).")
    if masks.dtype == torch.bool or masks.is_floating_point():
        raise ValueError(f"{where}: a map (H, W) holds integers, the places of its segments, not {masks.dtype}.")
    if masks.device.type == "cpu" and masks.numel() and not -1 <= masks.min() <= masks.max() < len(labels):
        raise ValueError(
            f"{where}: the map holds {int(masks.min())}..{int(masks.max())}, but places in class_labels go from 0 to "
            f"{len(labels) - 1}, and -1 is for pixels in no segment."
        )


def check_inside(image: int, masks: Tensor) -> None:
    """Raise `ValueError` unless masks are bool, or hold 0 and one other number."""
    if masks.dtype == torch.bool or not masks.numel():
        return
    least, most = masks.amin(), masks.amax()
    if bool(least != 0) or bool(((masks != 0) & (masks != most)).any()):
        if bool(least == most) and bool(most.isfinite()):  # every pixel of all masks is inside
            return
        values = masks.unique()[:10].tolist()
        raise ValueError(f"Image {image}: mask_labels are 0 outside and 1, 255 or True inside, but hold {values}.")


def check_size(image: int, masks: Tensor, padded_size: tuple[int, int], image_sizes: Tensor | None) -> None:
    """Raise `ValueError` unless masks are as large as the network's input, or as their image without padding."""
    size = (masks.shape[-2], masks.shape[-1])
    if size == padded_size or (image_sizes is not None and size == tuple(image_sizes[image].tolist())):
        return
    raise ValueError(
        f"Image {image}: mask_labels {tuple(masks.shape)} are {size[0]} x {size[1]}, but pixel_values are "
        f"{padded_size[0]} x {padded_size[1]} (height x width): they must be equal, without or with padding. A stack "
        "is (M, H, W)."
    )


def pad_to(masks: list[Tensor], height: int, width: int) -> list[Tensor]:
    """Stacks (M, h, w) or maps (h, w) -> height x width, with no segment at the bottom and on the right."""

    def padded(pixels: Tensor) -> Tensor:
        bottom, right = height - pixels.shape[-2], width - pixels.shape[-1]
        # without padding F.pad makes a copy
        return F.pad(pixels, (0, right, 0, bottom), value=0 if pixels.ndim == 3 else -1) if bottom or right else pixels

    return [padded(pixels) for pixels in masks]


def count_items(class_labels: list[Tensor], num_queries: int) -> Tensor:
    """What the loss of a step is divided by: segments, matched segments (at most N an image), images: (3,) float32.

    Summed over the batches that one optimiser step accumulates (and over processes, if the loss is multiplied by
    their number, as Trainer does), it is `num_items_in_batch`.
    """
    numbers = [len(labels) for labels in class_labels]
    counts = [sum(numbers), sum(min(number, num_queries) for number in numbers), len(numbers)]
    return torch.tensor(counts, dtype=torch.float32, device="cpu")


def count_pixels(labels: Tensor, ignore_index: int) -> Tensor:
    """What the per-pixel loss of a step is divided by: labelled pixels, () float32; summed as `count_items`."""
    return (labels != ignore_index).sum().float()


def per_pixel_loss(logits: Tensor, labels: Tensor, ignore_index: int, pixels: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies of labelled pixels / `pixels` (None: their number), in float32.

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
    """Divisor of the per-pixel loss: `num_items_in_batch`, the labelled pixels of a whole step; None: of this batch in
    all processes, over their number, as gradients are averaged."""
    if num_items_in_batch is not None:
        return torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=labels.device).clamp(min=1)
    pixels, processes = count_pixels(labels, ignore_index), 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(pixels)
        processes = dist.get_world_size()
    return pixels.clamp(min=1) / processes

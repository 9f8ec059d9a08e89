"""Matchers: which query explains which ground-truth segment (sigma of paper Section 3.2).

A matcher is `matcher(layers, targets) -> assignments`, where `assignments[layer][image]` is an `Assignment`. It sees
all layers and images of a step at once, so that the costs leave the device in one transfer. A new one is a class and
a line in `MATCHERS`.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers.utils import is_scipy_available, logging

from .box_ops import box_losses, boxes_of_masks, has_box, to_centres
from .configuration_maskcls import MATCHERS, matching_weights
from .contracts import Assignment, SegmentLogits
from .mask_costs import pairwise_dice, pairwise_losses

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment

logger = logging.get_logger(__name__)


@dataclass
class SegmentTargets:
    """Ground-truth segments of a batch.

    Args:
        masks (`list[torch.Tensor]`): for each image a stack (M, H, W) bool, or a map (H, W) of the place of each
            pixel's segment in `labels`, -1 where there is none. M may differ between images; H and W too without
            `counted`.
        labels (`list[torch.Tensor]`): each (M,) int64.
        counted (`torch.Tensor` of shape `(B, H, W)`, *optional*): True where a pixel counts: neither padding nor
            void. None: all do.
        image_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): height and width of each image without padding, to
            which its boxes are relative. None: those of its masks.
    """

    masks: list[Tensor]
    labels: list[Tensor]
    counted: Tensor | None = None
    image_sizes: Tensor | None = None

    @cached_property
    def numbers(self) -> list[int]:
        """M of each image."""
        return [len(labels) for labels in self.labels]

    @cached_property
    def boxes(self) -> list[Tensor]:
        """Boxes (cx, cy, w, h) around the counted pixels of each image's segments (M, 4) float32, in 0..1; zeros where
        a segment has none."""
        boxes = []
        for image, (pixels, number) in enumerate(zip(self.masks, self.numbers, strict=True)):
            counted = None if self.counted is None else self.counted[image]
            own_size = torch.tensor(pixels.shape[-2:], device=pixels.device)
            height_width = own_size if self.image_sizes is None else self.image_sizes[image]
            corners = boxes_of_masks(pixels, number, counted) / height_width.flip(0).repeat(2)
            boxes.append(to_centres(corners.float()))
        return boxes

    def resampled(self, image: int, size: torch.Size, at_centres: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (M, h * w), labels (M,), counted pixels (h * w,) of one image at a size (h, w), as float32.

        Of each cell the first pixel, as in the paper's code, or the one `at_centres`, where upsampling puts the cell.
        """
        pixels = self.masks[image]
        height, width = pixels.shape[-2:]
        rows = nearest_indices(height, size[0], pixels.device, at_centres)[:, None]
        columns = nearest_indices(width, size[1], pixels.device, at_centres)
        masks = every_mask(pixels[..., rows, columns], self.numbers[image]).flatten(1).float()
        counted = masks.new_ones(masks.shape[1]) if self.counted is None else self.counted[image][rows, columns]
        return masks, self.labels[image], counted.flatten().float()

    def write_chosen(self, image: int, segments: Tensor, masks: Tensor) -> None:
        """Masks of the segments at the given places (n,) of one image, into (n, H, W) bool."""
        pixels = self.masks[image]
        if pixels.ndim == 3:
            torch.index_select(pixels, 0, segments, out=masks)
        else:
            torch.eq(pixels, segments.to(pixels.dtype).view(-1, 1, 1), out=masks)


class CostsNotFinite(ValueError, FloatingPointError):
    """A matching cost is NaN or infinite."""


class BipartiteMatcher:
    """Minimal-cost one-to-one matching, cost = -p_i(c_j) and L_mask as in the loss (paper Section 3.2).

    Costs are computed in float32 at the resolution of the mask logits, with nearest-resampled targets, as in the
    paper's code. With more segments than queries (the paper assumes N >= N^gt) the best N pairs are kept and a warning
    is given once. A matcher with other costs is a subclass with `of_image` and `terms` of its own.

    Raises:
        `CostsNotFinite`: a `ValueError`; names image, layer and term.
    """

    matching = "bipartite"

    def __init__(self, config):
        if not is_scipy_available():
            raise ImportError("Bipartite matching needs scipy: pip install scipy")
        self.weights = matching_weights(config, self.matching)
        self.warned = False

    @torch.no_grad()
    def __call__(self, layers: list[SegmentLogits], targets: SegmentTargets) -> list[list[Assignment]]:
        self.warn_about_lost_segments(targets.numbers, layers[0].class_logits.shape[1])
        size = layers[0].mask_logits.shape[-2:]
        images = [self.of_image(targets, image, size) for image in range(len(targets.labels))]
        costs = [
            sum(self.weights[term] * cost for term, cost in self.terms(layer, image, *targets_of_image).items())
            for layer in layers
            for image, targets_of_image in enumerate(images)
        ]
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()  # the only transfer of a step
        assignments, start = [], 0
        for index, cost in enumerate(costs):
            layer, image = divmod(index, len(images))
            matrix = on_host[start : start + cost.numel()].reshape(cost.shape)  # (N, M)
            start += cost.numel()
            if not np.isfinite(matrix).all():
                self.raise_about(layers, layer, image, images[image])
            assignments.append(Assignment(*(torch.from_numpy(i) for i in linear_sum_assignment(matrix))))
        return [assignments[i : i + len(images)] for i in range(0, len(assignments), len(images))]

    def of_image(self, targets: SegmentTargets, image: int, size: torch.Size) -> tuple[Tensor, ...]:
        """What `terms` needs of the targets of one image; `size` is that of the mask logits."""
        return targets.resampled(image, size)

    def terms(
        self, layer: SegmentLogits, image: int, masks: Tensor, labels: Tensor, counted: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted cost matrices (N, M) of one image; masks (M, h * w), counted (h * w)."""
        logits = layer.mask_logits[image].float().flatten(1)  # (N, h * w)
        focal, dice = pairwise_losses(logits, masks, counted)
        return {"class": class_cost(layer, image, labels), "mask": focal, "dice": dice}

    def warn_about_lost_segments(self, numbers: list[int], num_queries: int) -> None:
        worst = max(numbers, default=0)
        if worst > num_queries and not self.warned:
            self.warned = True
            logger.warning(
                f"Image {numbers.index(worst)} of a batch has {worst} ground-truth segments but the model predicts "
                f"num_queries={num_queries}: only its {num_queries} best-matching segments are trained on. Raise "
                "num_queries or use smaller crops. This is said once."
            )

    def raise_about(self, layers: list[SegmentLogits], layer: int, image: int, targets: tuple) -> None:
        for term, cost in self.terms(layers[layer], image, *targets).items():
            bad = ~torch.isfinite(cost)
            if bad.any():
                value = "NaN" if cost.isnan().any() else "infinite"
                raise CostsNotFinite(
                    f"The {term} cost of image {image} in decoder layer {layer} of {len(layers)} is {value} for "
                    f"{int(bad.sum())} of {bad.numel()} pairs: the network's logits are not finite. Lower the "
                    "learning rate, clip gradients, or check the input for NaN."
                )
        raise CostsNotFinite(f"The matching cost of image {image} in decoder layer {layer} overflows float32.")


class BoxMatcher(BipartiteMatcher):
    """Bipartite matching by boxes instead of masks, as DETR: cost = -p_i(c_j), the L1 distance of the boxes and
    1 - GIoU (the paper's ablation of matching).

    A segment without counted pixels has no box. It costs the same with every query, the most that a box can cost: it
    is matched by its class alone, and is the first to be left out.
    """

    matching = "box"

    def of_image(self, targets: SegmentTargets, image: int, size: torch.Size) -> tuple[Tensor, ...]:
        return targets.boxes[image], targets.labels[image]

    def terms(self, layer: SegmentLogits, image: int, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        if layer.boxes is None:
            raise ValueError("matching='box' needs predicted boxes: make or load the model with matching='box'.")
        distance, giou = box_losses(layer.boxes[image].float()[:, None], boxes)
        known = has_box(boxes)
        return {
            "class": class_cost(layer, image, labels),
            "box": distance * known + 4 * ~known,
            "giou": giou * known + 2 * ~known,
        }


class PQMatcher(BipartiteMatcher):
    """Bipartite matching that maximises the similarity p_i(c_j) * Dice(m_i, m_j), after recognition and segmentation
    quality, the factors of PQ (Max-DeepLab, PQ-style loss)."""

    matching = "pq"

    def __init__(self, config):
        super().__init__(config)
        self.weights = {"similarity": 1.0}

    def of_image(self, targets: SegmentTargets, image: int, size: torch.Size) -> tuple[Tensor, ...]:
        return targets.resampled(image, size, at_centres=True)

    def terms(
        self, layer: SegmentLogits, image: int, masks: Tensor, labels: Tensor, counted: Tensor
    ) -> dict[str, Tensor]:
        dice = pairwise_dice(layer.mask_logits[image].float().flatten(1).sigmoid(), masks, counted)
        return {"similarity": class_cost(layer, image, labels) * dice}


class FixedMatcher:
    """Query k predicts class k (paper Section 3.2, fixed matching; N = K).

    Raises:
        `ValueError`: N differs from K, or an image has two segments of one class.
    """

    def __init__(self, config):
        if config.num_queries != config.num_labels:
            raise ValueError(
                f"Fixed matching gives query k to class k: num_queries={config.num_queries} must equal "
                f"num_labels={config.num_labels}. Set one to the other, or matching='bipartite'."
            )

    def __call__(self, layers: list[SegmentLogits], targets: SegmentTargets) -> list[list[Assignment]]:
        labels = torch.cat(targets.labels).tolist()  # the only transfer of a step
        assignments, start = [], 0
        for image, number in enumerate(targets.numbers):
            classes = labels[start : start + number]
            start += number
            twice = sorted(c for c, times in Counter(classes).items() if times > 1)
            if twice:
                raise ValueError(
                    f"Fixed matching takes one segment a class, but image {image} has several of class {twice}. "
                    "Use semantic targets (one segment a class), or matching='bipartite'."
                )
            assignments.append(
                Assignment(torch.tensor(classes, dtype=torch.int64, device="cpu"), torch.arange(number, device="cpu"))
            )
        return [assignments] * len(layers)


MATCHERS.register("bipartite", BipartiteMatcher)
MATCHERS.register("fixed", FixedMatcher)
MATCHERS.register("box", BoxMatcher)
MATCHERS.register("pq", PQMatcher)


def class_cost(layer: SegmentLogits, image: int, labels: Tensor) -> Tensor:
    """-p_i(c_j) (N, M) of the classes (M,) of one image's segments."""
    return -layer.class_logits[image].float().softmax(-1)[:, labels]


def every_mask(pixels: Tensor, number: int) -> Tensor:
    """A stack (M, H, W) as it is; a map of places (H, W) as the stack of its `number` masks."""
    return pixels if pixels.ndim == 3 else pixels == torch.arange(number, device=pixels.device).view(-1, 1, 1)


def nearest_indices(full: int, cells: int, device: torch.device, at_centres: bool = False) -> Tensor:
    """Index in 0..full-1 that nearest resampling to `cells` picks for each cell (floor, as torch's "nearest"; or
    `at_centres`, as its "nearest-exact")."""
    return (2 * torch.arange(cells, device=device) + at_centres) * full // (2 * cells)

"""Matchers: which query explains which ground-truth segment (sigma of paper Section 3.2).

A matcher is `matcher(layers, targets) -> assignments`, where `assignments[layer][image]` is an `Assignment`. It sees
all layers and images of a step at once, so that the costs leave the device in one transfer. A new one is a class and
a line in `MATCHERS`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import is_scipy_available, logging

from .contracts import Assignment, SegmentLogits
from .mask_costs import pairwise_losses

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
    """

    masks: list[Tensor]
    labels: list[Tensor]
    counted: Tensor | None = None

    @cached_property
    def numbers(self) -> list[int]:
        """M of each image."""
        return [len(labels) for labels in self.labels]

    def resampled(self, image: int, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (M, h * w), labels (M,), counted pixels (h * w,) of one image at a size (h, w), as float32."""
        pixels = self.masks[image]
        height, width = pixels.shape[-2:]
        rows = nearest_indices(height, size[0], pixels.device)[:, None]
        columns = nearest_indices(width, size[1], pixels.device)
        masks = every_mask(pixels[..., rows, columns], self.numbers[image]).flatten(1).float()
        counted = masks.new_ones(masks.shape[1]) if self.counted is None else self.counted[image][rows, columns]
        return masks, self.labels[image], counted.flatten().float()

    def chosen(self, image: int, segments: Tensor) -> Tensor:
        """Masks (n, H, W) bool of the segments at the given places (n,) of one image."""
        pixels = self.masks[image]
        return pixels[segments] if pixels.ndim == 3 else pixels == segments.view(-1, 1, 1)


class CostsNotFinite(ValueError, FloatingPointError):
    """A matching cost is NaN or infinite."""


class BipartiteMatcher:
    """Minimal-cost one-to-one matching, cost = -p_i(c_j) and L_mask as in the loss (paper Section 3.2).

    Costs are computed in float32 at the resolution of the mask logits, with nearest-resampled targets, as in the
    paper's code. With more segments than queries (the paper assumes N >= N^gt) the best N pairs are kept and a warning
    is given once.

    Raises:
        `CostsNotFinite`: a `ValueError`; names image, layer and term.
    """

    def __init__(self, config):
        if not is_scipy_available():
            raise ImportError("Bipartite matching needs scipy: pip install scipy")
        self.weights = {
            "class": config.cross_entropy_weight,
            "mask": config.mask_weight,
            "dice": config.dice_weight,
        }
        if not any(self.weights.values()):
            raise ValueError("Bipartite matching needs a weight above 0: cross_entropy, mask or dice.")
        self.warned = False

    @torch.no_grad()
    def __call__(self, layers: list[SegmentLogits], targets: SegmentTargets) -> list[list[Assignment]]:
        self.warn_about_lost_segments(targets.numbers, layers[0].class_logits.shape[1])
        size = layers[0].mask_logits.shape[-2:]
        images = [targets.resampled(image, size) for image in range(len(targets.labels))]
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

    def terms(
        self, layer: SegmentLogits, image: int, masks: Tensor, labels: Tensor, counted: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted cost matrices (N, M) of one image; masks (M, h * w), counted (h * w)."""
        probabilities = layer.class_logits[image].float().softmax(-1)  # (N, K + 1)
        logits = layer.mask_logits[image].float().flatten(1)  # (N, h * w)
        focal, dice = pairwise_losses(logits, masks, counted)
        return {"class": -probabilities[:, labels], "mask": focal, "dice": dice}

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
            twice = sorted({c for c in classes if classes.count(c) > 1})
            if twice:
                raise ValueError(
                    f"Fixed matching takes one segment a class, but image {image} has several of class {twice}. "
                    "Use semantic targets (one segment a class), or matching='bipartite'."
                )
            assignments.append(Assignment(torch.tensor(classes, dtype=torch.int64), torch.arange(number)))
        return [assignments] * len(layers)


# A "box" matcher (costs of boxes instead of masks, as in DETR) would be one more line here.
MATCHERS: dict[str, Any] = {"bipartite": BipartiteMatcher, "fixed": FixedMatcher}


def every_mask(pixels: Tensor, number: int) -> Tensor:
    """A stack (M, H, W) as it is; a map of places (H, W) as the stack of its `number` masks."""
    return pixels if pixels.ndim == 3 else pixels == torch.arange(number, device=pixels.device).view(-1, 1, 1)


def nearest_indices(full: int, cells: int, device: torch.device) -> Tensor:
    """Index in 0..full-1 that nearest resampling to `cells` picks for each cell (floor, as torch's "nearest")."""
    return torch.arange(cells, device=device) * full // cells

"""Losses of Max-DeepLab (Wang et al., MaX-DeepLab, CVPR 2021): PQ-style loss and auxiliary losses.

The functions are of one image, at the resolution of the mask logits, P = h * w pixels, as in its code. Float masks
(M, P), labels (M,) and `counted` (P,) are those of `SegmentTargets.resampled`, at the centres of the cells: borders are
then right without the losses of Eq. 1.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

from .contracts import Assignment, PixelLogits, SegmentLogits, layer_suffix
from .mask_costs import dice_coefficient
from .matchers import SegmentTargets

ALPHA = 0.75  # share of the matched pairs in the PQ-style loss
TEMPERATURE = 0.3  # of the instance discrimination; both as in the paper


class MaxDeepLabLosses:
    """The losses whose weight is above 0, each a sum over images: divided by their number, a mean.

    `loss_pq` and `loss_mask_id` are of each decoder layer, named as in `MaskClsCriterion`;
    `loss_instance_discrimination` and `loss_semantic` look at pixels alone.
    """

    def __init__(self, config):
        self.exclusive_masks = config.exclusive_masks
        self.weights = {
            "loss_pq": config.pq_weight,
            "loss_mask_id": config.mask_id_weight,
            "loss_instance_discrimination": config.instance_discrimination_weight,
            "loss_semantic": config.semantic_weight,
        }

    def __call__(
        self,
        layers: list[SegmentLogits],
        pixels: PixelLogits | None,
        targets: SegmentTargets,
        assignments: list[list[Assignment]],
    ) -> dict[str, Tensor]:
        """
        Raises:
            `ValueError`: `pixels` lacks what a loss looks at.
        """
        if not any(self.weights.values()):
            return {}
        size = layers[0].mask_logits.shape[-2:]
        losses: dict[str, list[Tensor]] = defaultdict(list)
        for image in range(len(targets.labels)):
            resampled = targets.resampled(image, size, at_centres=True)
            for index, layer in enumerate(layers):
                suffix = layer_suffix(index, len(layers))
                for name, loss in self.of_layer(layer, image, *resampled, assignments[index][image]).items():
                    losses[f"{name}{suffix}"].append(loss)
            for name, loss in self.of_pixels(pixels or PixelLogits(), image, *resampled).items():
                losses[name].append(loss)
        return {name: torch.stack(of_images).sum() for name, of_images in losses.items()}

    def of_layer(
        self, layer: SegmentLogits, image: int, masks: Tensor, labels: Tensor, counted: Tensor, assignment: Assignment
    ) -> dict[str, Tensor]:
        class_logits, mask_logits = layer.class_logits[image], layer.mask_logits[image].flatten(1)
        pairs = Assignment(*(indices.to(masks.device) for indices in assignment))
        losses = {}
        if self.weights["loss_pq"]:
            losses["loss_pq"] = pq_style_loss(class_logits, mask_logits, masks, labels, counted, pairs)
        if self.weights["loss_mask_id"]:
            log_p = F.logsigmoid(mask_logits) if self.exclusive_masks else mask_logits.log_softmax(0)
            losses["loss_mask_id"] = mask_id_loss(log_p, masks, counted, pairs)
        return losses

    def of_pixels(
        self, pixels: PixelLogits, image: int, masks: Tensor, labels: Tensor, counted: Tensor
    ) -> dict[str, Tensor]:
        losses = {}
        if self.weights["loss_instance_discrimination"]:
            embeddings = of_image(pixels.embeddings, image, "instance_discrimination_weight needs per-pixel embeddings")
            losses["loss_instance_discrimination"] = instance_discrimination_loss(embeddings, masks, counted)
        if self.weights["loss_semantic"]:
            logits = of_image(pixels.semantic_logits, image, "semantic_weight needs semantic logits")
            losses["loss_semantic"] = semantic_loss(logits, masks, labels, counted)
        return losses


def of_image(maps: Tensor | None, image: int, needed: str) -> Tensor:
    """(B, C, h, w) -> (C, P) float32 of one image; `ValueError` where there are none."""
    if maps is None:
        raise ValueError(f"{needed}, which the model does not give: make or load it with this weight above 0.")
    return maps[image].float().flatten(1)


def pq_style_loss(
    class_logits: Tensor, mask_logits: Tensor, masks: Tensor, labels: Tensor, counted: Tensor, pairs: Assignment
) -> Tensor:
    """ALPHA * (sum over matched pairs of p(c) * -Dice + Dice * -log p(c)) + (1 - ALPHA) * (sum over unmatched queries
    of -log p(no object)), divided by N: a mean over the queries, as in Max-DeepLab's code.

    The first factor of each product has no gradient: the gradient is that of -p(c) * Dice with a cross-entropy in
    place of the probability. The loss may be negative.

    Args:
        class_logits: (N, K + 1), "no object" last.
        mask_logits: (N, P).
    """
    queries, segments = pairs
    log_p = class_logits.log_softmax(-1)
    of_class = log_p[queries, labels[segments]]
    matched, wanted = mask_logits[queries].sigmoid() * counted, masks[segments] * counted
    quality = dice_coefficient((matched * wanted).sum(1), matched.sum(1) + wanted.sum(1))
    positive = -(of_class.exp().detach() * quality + quality.detach() * of_class).sum()
    unmatched = log_p.new_ones(len(log_p)).index_fill(0, queries, 0.0)
    negative = -(unmatched * log_p[:, -1]).sum()
    return (ALPHA * positive + (1 - ALPHA) * negative) / len(log_p)


def instance_discrimination_loss(embeddings: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
    """Contrast of the segments of an image: each pixel's embedding should be nearest to that of its own segment, the
    sum of the embeddings inside, both normalised. Cross-entropy over the segments of the cosines / TEMPERATURE, a mean
    over the pixels inside segments.

    Args:
        embeddings: (C, P), in any length.
    """
    if not len(masks):
        return embeddings[:, :0].sum()  # zero, and still part of the graph
    masks = masks * counted
    pixels = F.normalize(embeddings, dim=0)
    segments = F.normalize(masks @ pixels.T, dim=1)  # (M, C)
    cosines = segments @ pixels  # (M, P)
    absent = masks.sum(1, keepdim=True) == 0  # smaller than a cell, or void
    logits = (cosines / TEMPERATURE).masked_fill(absent, torch.finfo(cosines.dtype).min)
    return membership_loss(logits.log_softmax(0), masks > 0)


def mask_id_loss(log_probabilities: Tensor, masks: Tensor, counted: Tensor, pairs: Assignment) -> Tensor:
    """Cross-entropy over the N masks at each pixel with the query that its segment is matched with, a mean over the
    pixels inside matched segments. `log_probabilities` (N, P): of each mask at each pixel."""
    queries, segments = pairs
    return membership_loss(log_probabilities[queries], masks[segments] * counted > 0)


def semantic_loss(logits: Tensor, masks: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of the classes (K, P) at each pixel, a mean over the pixels inside segments."""
    of_class = F.one_hot(labels, len(logits)).to(masks.dtype).T  # (K, M)
    return membership_loss(logits.log_softmax(0), of_class @ (masks * counted) > 0)


def membership_loss(log_probabilities: Tensor, members: Tensor) -> Tensor:
    """Mean over the pixels with a member of -log of the members' probability, from (S, P) and (S, P) bool. A pixel has
    one, unless segments overlap: then any of them is right."""
    if not len(members):
        return log_probabilities.sum()  # zero, and still part of the graph
    inside = members.any(0)
    outside = log_probabilities.masked_fill(~(members | ~inside), float("-inf"))
    losses = -outside.logsumexp(0) * inside
    return losses.sum() / inside.sum().clamp(min=1)

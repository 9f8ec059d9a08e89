"""Segment embeddings -> probability-mask pairs (paper Section 3.2, segmentation module)."""

import torch
from torch import Tensor, nn

from .contracts import PixelFeatures, PixelLogits, SegmentLogits
from .layers import MLP, QueryTable, all_rows


class SegmentationModule(nn.Module):
    """A linear classifier over K + 1 classes and an MLP whose output, dotted with E_pixel, gives the mask.

    Some settings add a head: boxes for `matching="box"` (an MLP of 3 layers and a sigmoid, as DETR), classes of pixels
    for `semantic_weight`. With `query_priors`, class logits and mask embeddings are added to those that a query has
    from the start, for any image.
    """

    def __init__(self, config):
        super().__init__()
        self.has_priors = config.query_priors
        if self.has_priors:
            self.class_priors = QueryTable(config.num_queries, config.num_labels + 1)
            self.mask_priors = QueryTable(config.num_queries, config.mask_feature_size)
        self.class_predictor = nn.Linear(config.hidden_size, config.num_labels + 1)
        self.mask_embedder = MLP(config.hidden_size, config.hidden_size, config.mask_feature_size, num_layers=3)
        self.exclusive_masks = config.exclusive_masks
        with_boxes = config.matching == "box"
        self.bbox_predictor = MLP(config.hidden_size, config.hidden_size, 4, num_layers=3) if with_boxes else None
        with_semantics = config.semantic_weight > 0
        self.semantic_predictor = nn.Conv2d(config.mask_feature_size, config.num_labels, 1) if with_semantics else None
        self.looks_at_pixels = with_semantics or config.instance_discrimination_weight > 0

    def forward(self, segment_embeddings: Tensor, features: PixelFeatures) -> SegmentLogits:
        """(B, N, C) -> class logits (B, N, K + 1), mask logits (B, N, h, w), boxes (B, N, 4) with a box head."""
        class_logits = self.class_predictor(segment_embeddings)
        mask_embeddings = self.mask_embedder(segment_embeddings)  # (B, N, C_E)
        if self.has_priors:
            class_logits = class_logits + all_rows(self.class_priors, class_logits.device)
            mask_embeddings = mask_embeddings + all_rows(self.mask_priors, mask_embeddings.device)
        mask_logits = features.mask_logits(mask_embeddings)
        if self.exclusive_masks:
            mask_logits = exclusive_logits(mask_logits)
        boxes = None if self.bbox_predictor is None else self.bbox_predictor(segment_embeddings).sigmoid()
        return SegmentLogits(class_logits, mask_logits, boxes)

    def of_pixels(self, features: PixelFeatures) -> PixelLogits:
        """What auxiliary losses ask of each pixel."""
        embeddings = features.project() if self.looks_at_pixels else None
        return PixelLogits(embeddings, None if self.semantic_predictor is None else self.semantic_predictor(embeddings))


def exclusive_logits(mask_logits: Tensor) -> Tensor:
    """Logits (B, N, h, w), N >= 2, whose sigmoid is the softmax over the N masks at each pixel (Max-DeepLab): l_i -
    log(sum of exp(l_j) over j != i). Computed in float32 at least; finite where l is."""
    logits = mask_logits if mask_logits.dtype == torch.float64 else mask_logits.float()
    largest, place = logits.max(1, keepdim=True)
    is_largest = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, place, True)
    others = logits.masked_fill(is_largest, float("-inf")).logsumexp(1, keepdim=True)
    log_probabilities = logits - torch.logaddexp(largest, others)
    # Of the largest, 1 - p may be 0 in floating point; of the rest p is 1/2 at most.
    log_rest = torch.log1p(-log_probabilities.masked_fill(is_largest, float("-inf")).exp())
    return torch.where(is_largest, logits - others, log_probabilities - log_rest).to(mask_logits.dtype)

"""Segment embeddings -> probability-mask pairs (paper Section 3.2, segmentation module)."""

from torch import Tensor, nn

from .contracts import PixelFeatures, SegmentLogits
from .layers import MLP, QueryTable


class SegmentationModule(nn.Module):
    """A linear classifier over K + 1 classes and an MLP whose output, dotted with E_pixel, gives the mask.

    With `config.query_priors`, both are added to what a query has from the start, for any image.
    """

    def __init__(self, config):
        super().__init__()
        self.has_priors = config.query_priors
        if self.has_priors:
            self.class_priors = QueryTable(config.num_queries, config.num_labels + 1)
            self.mask_priors = QueryTable(config.num_queries, config.mask_feature_size)
        self.class_predictor = nn.Linear(config.hidden_size, config.num_labels + 1)
        self.mask_embedder = MLP(config.hidden_size, config.hidden_size, config.mask_feature_size, num_layers=3)

    def forward(self, segment_embeddings: Tensor, features: PixelFeatures) -> SegmentLogits:
        """(B, N, C) -> class logits (B, N, K + 1), mask logits (B, N, h, w)."""
        class_logits = self.class_predictor(segment_embeddings)
        mask_embeddings = self.mask_embedder(segment_embeddings)  # (B, N, C_E)
        if self.has_priors:
            class_logits = class_logits + self.class_priors.weight
            mask_embeddings = mask_embeddings + self.mask_priors.weight
        return SegmentLogits(class_logits, features.mask_logits(mask_embeddings))

"""Segment embeddings -> probability-mask pairs (paper Section 3.2, segmentation module)."""

from torch import Tensor, nn

from .contracts import PixelFeatures, SegmentLogits
from .layers import MLP


class SegmentationModule(nn.Module):
    """A linear classifier over K + 1 classes and an MLP whose output, dotted with E_pixel, gives the mask."""

    def __init__(self, config):
        super().__init__()
        self.class_predictor = nn.Linear(config.hidden_size, config.num_labels + 1)
        self.mask_embedder = MLP(config.hidden_size, config.hidden_size, config.mask_feature_size, num_layers=3)

    def forward(self, segment_embeddings: Tensor, features: PixelFeatures) -> SegmentLogits:
        """(B, N, C) -> class logits (B, N, K + 1), mask logits (B, N, h, w)."""
        class_logits = self.class_predictor(segment_embeddings)
        mask_embeddings = self.mask_embedder(segment_embeddings)  # (B, N, C_E)
        return SegmentLogits(class_logits, features.mask_logits(mask_embeddings))

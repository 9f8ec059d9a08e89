"""The maps step by step, as the paper's code makes them: upsample the logits, crop, resize, then take the greatest.

For whole maps and in plain torch: it says what post_processing.py computes, which is tested against it. Arguments are
those of post_processing.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .resizing import Size


def resized(maps: Tensor, size: Size) -> Tensor:
    """(C, h, w) -> (C, *size), bilinear."""
    height, width = (int(length) for length in size)
    return F.interpolate(maps[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def at_padded_size(logits: Tensor, padded_size: Size, valid_size: Size) -> Tensor:
    """Logits (C, h, w) upsampled to what the network saw, without the padding."""
    height, width = valid_size
    return resized(logits.float(), padded_size)[:, :height, :width]


def semantic_scores(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    valid_size: Size,
    target_size: Size,
    resize: str = "scores",
) -> Tensor:
    """Class scores (K, H, W); the map is their argmax."""
    class_probs = class_queries_logits.float().softmax(-1)[:, :-1]
    mask_logits = at_padded_size(masks_queries_logits, padded_size, valid_size)
    if resize == "logits":
        mask_logits = resized(mask_logits, target_size)
    scores = torch.einsum("nk,nyx->kyx", class_probs, mask_logits.sigmoid())
    return resized(scores, target_size)


def mask_logits(masks_queries_logits: Tensor, *, padded_size: Size, valid_size: Size, target_size: Size) -> Tensor:
    """Mask logits (N, H, W): panoptic and instance maps start from them."""
    return resized(at_padded_size(masks_queries_logits, padded_size, valid_size), target_size)


def panoptic_winners(
    class_queries_logits: Tensor, masks_queries_logits: Tensor, threshold: float = 0.8, **sizes: Size
) -> tuple[Tensor, Tensor]:
    """Class times mask probability (n, H, W) of the n queries that take part, and their indices (n,). A pixel goes to
    the greatest."""
    scores, labels = class_queries_logits.float().softmax(-1).max(-1)
    queries = ((labels < class_queries_logits.shape[1] - 1) & (scores > threshold)).nonzero()[:, 0]
    return mask_logits(masks_queries_logits[queries], **sizes).sigmoid() * scores[queries, None, None], queries

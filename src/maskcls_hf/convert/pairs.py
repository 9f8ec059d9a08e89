"""Outputs of other models -> probability-mask pairs, for the same post-processing, evaluator and viewer.

Each function returns what `MaskClsForUniversalSegmentation` returns, so that it goes to
`MaskClsImageProcessor.post_process_{semantic,panoptic,instance}_segmentation` and to `maskcls_hf.metrics.Evaluator`. A
model whose `forward` returns it goes to `maskcls_hf.inference.Predictor`. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.layers import ValidRegion
from ..models.modeling_maskcls import MaskClsForUniversalSegmentationOutput

ZERO_PROB_LOGIT = -1e3  # class logit of a probability that is exactly 0 in float32
MAX_LOGIT = 6.0  # mask logit; near 1 a sigmoid in float32 could not tell two classes apart
MIN_LOGIT = -80.0  # mask logit; much below, a sigmoid is 0 in float32
PROBABILITY_MARGIN = 1e-6  # masks of detections are from this to 1 - this, so that their logits are finite: +-13.8


def pairs_from_detr(
    outputs: Any, image_sizes: Sequence[tuple[int, int]] | Tensor | None = None, pixel_mask: Tensor | None = None
) -> MaskClsForUniversalSegmentationOutput:
    """Pairs of transformers' `DetrForSegmentation`, which predicts them as they are.

    Semantic maps without `pixel_mask` are those of `DetrImageProcessor`. Its panoptic map differs where masks are
    resized: it resizes probabilities, here logits are; its instance map is a panoptic one, here instances may overlap.
    It does not crop the padding of a batch; here it is cropped if `pixel_mask` is given.

    Args:
        outputs: `logits` (B, N, K + 1), "no object" last, and `pred_masks` (B, N, h, w).
        image_sizes: of the images, which maps will have. None: that of the masks, or of the network's input.
        pixel_mask: (B, H, W) of the network's input, 1 for image, 0 for padding at the bottom and on the right.

    Raises:
        ValueError: no such outputs, or sizes of another number of images.
    """
    logits, masks = getattr(outputs, "logits", None), getattr(outputs, "pred_masks", None)
    if logits is None or masks is None or logits.ndim != 3 or masks.ndim != 4 or logits.shape[:2] != masks.shape[:2]:
        raise ValueError(
            f"outputs ({type(outputs).__name__}) need logits (B, N, K + 1) and pred_masks (B, N, h, w), as those of "
            "transformers' DetrForSegmentation."
        )
    sizes: dict[str, Any] = {"original_sizes": _checked_sizes(image_sizes, len(logits))}
    if pixel_mask is not None:
        region = ValidRegion.of_batch(pixel_mask[:, None], pixel_mask)
        sizes |= {"valid_sizes": region.sizes, "padded_sizes": torch.tensor([region.padded_size] * len(logits))}
    return MaskClsForUniversalSegmentationOutput(class_queries_logits=logits, masks_queries_logits=masks, **sizes)


def pairs_from_detections(
    detections: Sequence[Mapping[str, Tensor]],
    num_labels: int,
    label_offset: int = 1,
    image_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
) -> MaskClsForUniversalSegmentationOutput:
    """Pairs of an instance segmenter such as torchvision's Mask R-CNN.

    A detection becomes a pair: the probability of its class is its score, that of "no object" the rest. Images with
    fewer detections are filled up with empty pairs that are surely no object; those change no map.

    - Instance maps rank by score times mean mask probability inside the mask, as of all pairs.
    - Panoptic maps take a detection only if its score is above a half, whatever the threshold: else "no object" is more
      probable.
    - Semantic maps have no class for what nobody detected: there the masks' last 1e-6 of probability decide.

    Args:
        detections: of each image `labels` (n,), `scores` (n,) from 0 to 1 and `masks` (n, 1, H, W) or (n, H, W),
            probabilities over the whole image. n may be 0. Other entries, such as `boxes`, are not read.
        num_labels: K, without the background.
        label_offset: label of class 0: 1 where 0 is the background (torchvision), 0 where there is none.
        image_sizes: of the images, which maps will have. None: those of the masks, as torchvision gives them.

    Raises:
        ValueError: no image, a label outside the classes, a score or a mask outside 0 to 1, sizes that do not belong
            together; names the image.

    Examples:
        >>> found = {"labels": torch.tensor([1]), "scores": torch.tensor([0.9]), "masks": torch.ones(1, 4, 4)}
        >>> outputs = pairs_from_detections([found], num_labels=2)
        >>> outputs.class_queries_logits.shape, outputs.original_sizes.tolist()
        (torch.Size([1, 1, 3]), [[4, 4]])
    """
    if not detections:
        raise ValueError("detections are empty: give one entry an image, with n = 0 masks where nothing was found.")
    images = [_checked_detections(found, i, num_labels, label_offset) for i, found in enumerate(detections)]
    sizes = torch.tensor([masks.shape[1:] for _, _, masks in images])  # (B, 2)
    height, width = sizes.amax(0).tolist()
    queries = max(1, *(len(labels) for labels, _, _ in images))
    device = images[0][2].device
    class_logits = torch.full((len(images), queries, num_labels + 1), ZERO_PROB_LOGIT, device=device)
    class_logits[..., -1] = 0.0
    empty = float(_logit(torch.zeros(())))
    mask_logits = torch.full((len(images), queries, height, width), empty, device=device)
    for i, (labels, scores, masks) in enumerate(images):
        places = torch.arange(len(labels), device=device)
        class_logits[i, places, labels] = scores.log().clamp(min=ZERO_PROB_LOGIT)
        class_logits[i, places, -1] = (1 - scores).log().clamp(min=ZERO_PROB_LOGIT)
        mask_logits[i, : len(masks), : masks.shape[1], : masks.shape[2]] = _logit(masks)
    return MaskClsForUniversalSegmentationOutput(
        class_queries_logits=class_logits,
        masks_queries_logits=mask_logits,
        valid_sizes=sizes,
        padded_sizes=torch.tensor([[height, width]] * len(images)),
        original_sizes=sizes if image_sizes is None else _checked_sizes(image_sizes, len(images)),
    )


def pairs_from_logits(
    logits: Tensor, image_sizes: Sequence[tuple[int, int]] | Tensor | None = None
) -> MaskClsForUniversalSegmentationOutput:
    """Pairs of a model that classifies pixels: one a class, N = K.

    The semantic map is the argmax of the logits resized bilinearly to the image. For this the mask logits are the
    logits plus a number that is the same for all classes of a pixel: that changes no argmax, and neither do bilinear
    resizing, which is linear, and the sigmoid, which is monotone. The number makes the winner's mask probability its
    softmax probability, at most 0.998 (a mask logit of 6: nearer to 1 float32 could not tell classes apart). Where
    logits of a pixel differ by about 100 or more, those of the image are first multiplied by a number below 1, so that
    no sigmoid is 0.

    Every pair is surely of its class (probability 1): how sure the model is lies in its mask. Any other probability,
    the same for all pairs, would give the same semantic map.

    Args:
        logits: (B, K, h, w), the whole of which is image.
        image_sizes: of the images, which maps will have. None: (h, w).

    Raises:
        ValueError: another shape, a single class, NaN or infinite logits, sizes of another number of images.

    Examples:
        >>> from maskcls_hf import MaskClsImageProcessor
        >>> logits = torch.tensor([[[[2.0, -1.0]], [[0.0, 3.0]]]])  # (B, K, h, w)
        >>> MaskClsImageProcessor().post_process_semantic_segmentation(pairs_from_logits(logits))[0].tolist()
        [[0, 1]]
    """
    if logits.ndim != 4 or 0 in logits.shape:
        raise ValueError(f"logits must be (B, K, h, w), none of them 0, got {tuple(logits.shape)}.")
    if logits.shape[1] == 1:
        raise ValueError(
            "logits of one class leave nothing to choose from. Of a binary model make two: "
            "torch.cat([torch.zeros_like(logits), logits], dim=1), background and foreground."
        )
    logits = logits.detach().float()
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{int((~logits.isfinite()).sum())} of the {logits.numel()} logits are NaN or infinite.")
    batch, num_labels, *size = logits.shape
    # Between four pixels a winner has at least a quarter of its best logit and three quarters of its worst.
    spread = (logits.amax(1) - logits.amin(1)).amax((1, 2))  # (B,)
    logits = logits * (-MIN_LOGIT / (0.75 * spread + MAX_LOGIT)).clamp(max=1)[:, None, None, None]
    best, winner = logits.max(1, keepdim=True)
    sureness = best - logits.scatter(1, winner, -torch.inf).logsumexp(1, keepdim=True)  # logit of softmax
    class_logits = torch.full((num_labels, num_labels + 1), ZERO_PROB_LOGIT, device=logits.device).fill_diagonal_(0.0)
    sizes = _checked_sizes([size] * batch if image_sizes is None else image_sizes, batch)
    return MaskClsForUniversalSegmentationOutput(
        class_queries_logits=class_logits.expand(batch, -1, -1).contiguous(),
        masks_queries_logits=logits - best + sureness.clamp(max=MAX_LOGIT),
        valid_sizes=sizes,
        padded_sizes=sizes,
        original_sizes=sizes,
    )


def _logit(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN).logit()


def _checked_sizes(sizes: Any, count: int) -> Tensor | None:
    """(B, 2) int64."""
    if sizes is None:
        return None
    checked = torch.as_tensor(sizes, dtype=torch.int64)
    if checked.shape != (count, 2):
        raise ValueError(f"image_sizes must be one (height, width) for each of {count} images, got {checked.tolist()}.")
    return checked


def _checked_detections(
    found: Mapping[str, Tensor], image: int, num_labels: int, label_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (n,) from 0, scores (n,) and mask probabilities (n, H, W) of one image."""
    labels, scores, masks = found["labels"] - label_offset, found["scores"].detach().float(), found["masks"].detach()
    masks = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if masks.ndim != 3 or not len(labels) == len(scores) == len(masks) or 0 in masks.shape[1:]:
        raise ValueError(
            f"image {image}: labels {tuple(labels.shape)}, scores {tuple(scores.shape)} and masks "
            f"{tuple(found['masks'].shape)} must be (n,), (n,) and (n, 1, H, W)."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        wrong = sorted(set((labels[(labels < 0) | (labels >= num_labels)] + label_offset).tolist()))
        raise ValueError(
            f"image {image}: labels {wrong} are not from {label_offset} to {num_labels - 1 + label_offset}, "
            f"the {num_labels} classes from label_offset={label_offset} on."
        )
    for name, values in (("scores", scores), ("masks", masks)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"image {image}: {name} must be probabilities from 0 to 1.")
    return labels, scores, masks

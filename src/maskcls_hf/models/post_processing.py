"""Probability-mask pairs of one image -> semantic, panoptic and instance maps (paper Section 3.4).

Every function takes the predictions of ONE image (K classes, N queries), `class_queries_logits` (N, K+1) with
no-object last and `masks_queries_logits` (N, h, w), and three sizes (height, width):
- `padded_size`: what the network saw, padding included; logits are upsampled to it;
- `valid_size`: the image in it; the padding at the bottom and the right is cropped;
- `target_size`: (H, W), the size of the map that is returned.

Both resizes are bilinear with `align_corners=False`. The work is done in float32 whatever the dtype of the logits.

`PlainMaps` does the steps in the order of the paper, for whole maps. What runs makes the same maps with less work and
memory, to the rounding of float32: tiled_maps.py on a CPU, device_maps.py elsewhere.

Where implementations differ, `rule` says whose maps are made:
- "exact": those of MaskFormer's paper; instances as in Mask2Former's code.
- "paper": those of Mask2Former's code. In panoptic maps a pixel outside of its segment's own mask is void; classes
  without instances are left out after the best pairs of query and class are taken.
- "transformers": those of its Mask2Former. Masks pass through 384 x 384 pixels whatever the size of the image, padding
  included. Panoptic: probabilities are resized, and multiplied by the class score before they are compared with the
  mask threshold; a segment must win more than its share. Instances: as many pairs as queries, masks by nearest.
  Its slips are not repeated: ids are unique, a fused class is listed once, void is always the same value, and of
  instances that overlap the best is on top.

Errors: ValueError for NaN or infinite logits, shapes that do not belong together, sizes that are not positive,
an image larger than its padded size, thresholds outside [0, 1]; TypeError for sizes that are not two integers.
"""

import ctypes
import math
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .inference_defaults import defaults_of, require_rule, task_options
from .mask_cleanup import clean_instances, clean_map
from .options import checked_label_ids, plain
from .resampling import interpolate, nearest_indices
from .run_lengths import mask_to_coco_rle

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Size = Sequence[int] | Tensor  # (height, width); (2,)
TargetSizes = Sequence[tuple[int, int]] | Tensor | None

GROWTH = 128 << 20  # bytes, from which on freed memory is given back
STATM = Path("/proc/self/statm")
NO_CLASS = -1  # in semantic maps
OUTSIDE = -100.0  # mask logits beyond a window
SQUEEZED = (384, 384)  # what transformers' Mask2Former brings every mask to
Rule = Literal["exact", "transformers", "paper"]
# What transformers' ImageSegmentationPipeline passes where its user gives nothing.
PIPELINE_OPTIONS = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5}


@dataclass(frozen=True)
class ResizeGeometry:
    """The sizes (height, width) that a map passes through."""

    logits: tuple[int, int]
    padded: tuple[int, int]
    valid: tuple[int, int]  # the image; padding lies at the bottom and the right
    target: tuple[int, int]

    @classmethod
    def checked(cls, logits: Tensor, padded_size: Size, valid_size: Size, target_size: Size) -> "ResizeGeometry":
        """Raises TypeError or ValueError for what is no size, and for an image larger than its padded size.

        Args:
            logits: (..., h, w).
            padded_size: what the network saw.
            valid_size: the image in it.
            target_size: of the map.
        """
        padded = _checked_size(padded_size, "padded_size")
        valid = _checked_size(valid_size, "valid_size")
        target = _checked_size(target_size, "target_size")
        if valid[0] > padded[0] or valid[1] > padded[1]:
            raise ValueError(f"valid_size {valid} does not fit into padded_size {padded}; both are (height, width)")
        return cls((logits.shape[-2], logits.shape[-1]), padded, valid, target)


@dataclass(frozen=True)
class PlainMaps:
    """Maps of one image in the order of the paper, step by step for whole maps."""

    sizes: ResizeGeometry

    def to_padded_size(self, logits: Tensor) -> Tensor:
        """Logits (C, h, w) at what the network saw, without the padding."""
        height, width = self.sizes.valid
        return interpolate(logits, self.sizes.padded)[:, :height, :width]

    def to_target_size(self, maps: Tensor) -> Tensor:
        """Maps of the image as the network saw it -> (C, H, W)."""
        return interpolate(maps, self.sizes.target)

    def resize(self, logits: Tensor) -> Tensor:
        """Logits (C, h, w) -> (C, H, W). Panoptic and instance maps are made of these."""
        return self.to_target_size(self.to_padded_size(logits))

    def semantic_scores(self, class_probs: Tensor, mask_logits: Tensor, resize: str) -> Tensor:
        """(K, H, W): sum_i p_i(c) m_i, of class probabilities (N, K) and mask logits (N, h, w).

        Args:
            class_probs: (N, K), without no-object.
            mask_logits: (N, h, w).
            resize: "scores" or "logits", what is brought to the target size.
        """
        if resize == "logits":
            mask_probs = self.resize(mask_logits).sigmoid()  # (N, H, W)
            return torch.einsum("nk,nyx->kyx", class_probs, mask_probs)
        mask_probs = self.to_padded_size(mask_logits).sigmoid()  # (N, valid height, valid width)
        return self.to_target_size(torch.einsum("nk,nyx->kyx", class_probs, mask_probs))

    def semantic_map(self, class_probs: Tensor, mask_logits: Tensor, resize: str) -> Tensor:
        """The class of the highest score at each pixel: (H, W) int64.

        Args:
            class_probs: (N, K), without no-object.
            mask_logits: (N, h, w).
            resize: "scores" or "logits", what is brought to the target size.
        """
        return self.semantic_scores(class_probs, mask_logits, resize).argmax(0)

    def per_pixel_map(self, logits: Tensor) -> Tensor:
        """The class of the highest logit (K, h, w) at each pixel: (H, W) int64."""
        return self.resize(logits).argmax(0)

    def assign_pixels(self, scores: Tensor, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of n queries with class scores (n,) the index that each pixel goes to (H, W), how many pixels each gets (n,),
        and how many its own mask has (n,): where its logit is at least `mask_logit`.

        Args:
            scores: (n,), in 0..1.
            mask_logits: (n, h, w).
            mask_logit: of the mask threshold.
        """
        logits = self.resize(mask_logits)  # (n, H, W)
        winners = (scores[:, None, None] * logits.sigmoid()).argmax(0)  # (H, W)
        return winners, winners.flatten().bincount(minlength=len(scores)), (logits >= mask_logit).sum((1, 2))

    def mask_areas(self, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor]:
        """The pixels of each mask (n,), where its logit is above `mask_logit`, and the sum of its probabilities there
        (n,) float64.
        """
        logits = self.resize(mask_logits)  # (n, H, W)
        inside = logits > mask_logit
        return inside.sum((1, 2)), (logits.sigmoid() * inside).sum((1, 2)).double()

    def masks(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """(n, H, W) bool."""
        return self.resize(mask_logits) > mask_logit

    def instance_map(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """(H, W) int32: 1 + the index of the first mask that has the pixel, 0 where none has it."""
        masks = self.masks(mask_logits, mask_logit)
        if not len(masks):
            return torch.zeros(self.sizes.target, dtype=torch.int32, device=masks.device)
        return torch.where(masks.any(0), masks.int().argmax(0) + 1, 0).int()

    def own_winners(self, winners: Tensor, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """The map of `assign_pixels` with n, none of the masks, where the winner's own mask has not the pixel.

        Args:
            winners: (H, W).
            mask_logits: (n, h, w).
            mask_logit: of the mask threshold.
        """
        own = torch.full_like(winners, len(mask_logits))
        for query in range(len(mask_logits)):
            (logits,) = self.resize(mask_logits[query : query + 1])  # (H, W)
            own[(winners == query) & (logits >= mask_logit)] = query
        return own


class TransformersMaps(PlainMaps):
    """Panoptic and instance maps as transformers' Mask2Former makes them."""

    def assign_pixels(self, scores: Tensor, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor, Tensor]:
        """As of `PlainMaps`; probabilities are resized, and weighted before the threshold."""
        mask_probs = self.to_target_size(self.to_padded_size(mask_logits).sigmoid())
        weighted = scores[:, None, None] * mask_probs  # (n, H, W)
        winners = weighted.argmax(0)
        inside = weighted >= 1 / (1 + math.exp(-mask_logit))
        return winners, winners.flatten().bincount(minlength=len(scores)), inside.sum((1, 2))

    def mask_areas(self, mask_logits: Tensor, mask_logit: float) -> tuple[Tensor, Tensor]:
        """The mean probability is that before resizing."""
        logits = self.to_padded_size(mask_logits)
        inside = logits > mask_logit
        means = (logits.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        areas = self.masks(mask_logits, mask_logit).sum((1, 2))
        return areas, areas * means.double()

    def masks(self, mask_logits: Tensor, mask_logit: float) -> Tensor:
        """As of `PlainMaps`, by nearest."""
        masks = self.to_padded_size(mask_logits) > mask_logit
        rows, columns = (
            nearest_indices(length, out, masks.device) for length, out in zip(SQUEEZED, self.sizes.target, strict=True)
        )
        return masks[:, rows[:, None], columns]


def maps_of(logits: Tensor, padded_size: Size, valid_size: Size, target_size: Size) -> PlainMaps:
    """What makes maps of these sizes on the device of the logits.

    Args:
        logits: (..., h, w).
        padded_size: what the network saw.
        valid_size: the image in it.
        target_size: of the map.
    """
    sizes = ResizeGeometry.checked(logits, padded_size, valid_size, target_size)
    if logits.device.type == "cpu":
        from .tiled_maps import TiledMaps  # made of PlainMaps

        return TiledMaps(sizes)
    from .device_maps import DeviceMaps

    return DeviceMaps(sizes)


def _by_rule(maps: PlainMaps, rule: Rule) -> PlainMaps:
    """`maps`, or those of transformers in their place. Raises ValueError for an unknown rule."""
    require_rule(rule)
    return TransformersMaps(replace(maps.sizes, padded=SQUEEZED, valid=SQUEEZED)) if rule == "transformers" else maps


def _in_float32(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Without autocast, which would make the products below in half precision."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_in_float32
def semantic_map(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    valid_size: Size,
    target_size: Size,
    return_scores: bool = False,
    resize: Literal["scores", "logits"] = "scores",
    score_threshold: float | None = 0.0,
    rule: Rule = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """The class with the highest score: the sum over the queries of class probability times mask probability.

    Args:
        class_queries_logits: (N, K + 1), no-object last.
        masks_queries_logits: (N, h, w).
        padded_size: what the network saw; sizes are (height, width).
        valid_size: the image in it.
        target_size: of the map.
        return_scores: also return the scores, (K, H, W) float32. As sums over queries they can exceed 1.
        score_threshold: a pixel whose highest score is not above this is of no class, -1. 0: each pixel has a class,
            as in the paper. None: 0.5 for one class, which would fill the map, else 0.
        resize: what is resized to `target_size`: class scores made at the padded size ("scores": the paper's
            semantic configurations) or mask logits ("logits": its panoptic configurations).
        rule: with "transformers" masks pass through 384 x 384.

    Returns:
        The map (H, W) int64, or (map, scores).

    Examples:
        >>> classes = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])  # two queries; K = 2 and no-object
        >>> masks = torch.tensor([[[8.0, -8.0]], [[-8.0, 8.0]]])  # of 1 x 2 pixels
        >>> sizes = {"padded_size": (1, 2), "valid_size": (1, 2), "target_size": (1, 2)}
        >>> semantic_map(classes, masks, **sizes).tolist()
        [[0, 1]]
    """
    require_rule(rule)
    if rule == "transformers":
        padded_size = valid_size = SQUEEZED
    if resize not in ("scores", "logits"):
        raise ValueError(f'resize must be "scores" or "logits", got {resize!r}')
    class_probs, mask_logits = _checked_pairs(class_queries_logits, masks_queries_logits)
    maps = maps_of(mask_logits, padded_size, valid_size, target_size)
    score_threshold = least_score(score_threshold, class_probs.shape[1] - 1)
    if return_scores or score_threshold:
        scores = maps.semantic_scores(class_probs[:, :-1], mask_logits, resize)
        class_map = map_of_scores(scores, score_threshold)
        return (class_map, scores) if return_scores else class_map
    return maps.semantic_map(class_probs[:, :-1], mask_logits, resize)


def least_score(score_threshold: float | None, num_labels: int) -> float:
    """None: 0.5 for one class, else 0."""
    if score_threshold is None:
        return 0.5 if num_labels == 1 else 0.0
    _check_fractions(score_threshold=score_threshold)
    return score_threshold


def map_of_scores(scores: Tensor, score_threshold: float = 0.0) -> Tensor:
    """(K, H, W) -> the class of the highest score (H, W) int64, -1 where it is not above a threshold other than 0.

    Examples:
        >>> map_of_scores(torch.tensor([[[0.2, 0.3]], [[0.7, 0.1]]]), score_threshold=0.5).tolist()
        [[1, -1]]
    """
    if not score_threshold:
        return scores.argmax(0)
    highest, class_map = scores.max(0)
    return class_map.masked_fill_(~(highest > score_threshold), NO_CLASS)


@_in_float32
def per_pixel_map(
    logits: Tensor,
    *,
    padded_size: Size,
    valid_size: Size,
    target_size: Size,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class with the highest logit, for the per-pixel baselines.

    Args:
        padded_size: what the network saw; sizes are (height, width).
        valid_size: the image in it.
        target_size: of the map.
        logits: (K, h, w).
        return_scores: also return the resized logits, (K, H, W) float32.

    Returns:
        The map (H, W) int64, or (map, logits).
    """
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(f"logits of one image must be (K, h, w), none of them 0, got {tuple(logits.shape)}")
    logits = logits.detach().float()
    if not math.isfinite(logits.sum()):
        _check_finite("logits", logits)
    maps = maps_of(logits, padded_size, valid_size, target_size)
    if return_scores:
        scores = maps.resize(logits)
        return scores.argmax(0), scores
    return maps.per_pixel_map(logits)


def map_of_windows(
    windows: Sequence["Window"],
    *,
    size: Size,
    target_size: Size,
    return_scores: bool = False,
    score_threshold: float | None = 0.0,
    rule: Rule = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """As [`semantic_map`], of an image that the network saw in windows: the scores of windows are averaged.

    Args:
        windows: with pairs, sizes and place of each.
        target_size: of the map.
        return_scores: as of [`semantic_map`].
        score_threshold: as of [`semantic_map`].
        rule: as of [`semantic_map`].
        size: of the image, as its windows were cut out of it.
    """
    height, width = size
    total, count = torch.zeros(()), torch.zeros(height, width)
    for window in windows:
        scores: Any = semantic_map(*window.logits, **window.sizes, return_scores=True, rule=rule)[1]
        if not total.ndim:
            total = scores.new_zeros(len(scores), height, width)
            count = count.to(scores)
        total[(slice(None), *window.place)] += scores
        count[window.place] += 1
    sizes = {"padded_size": size, "valid_size": size, "target_size": target_size}
    least = least_score(score_threshold, len(total))
    if not (return_scores or least):
        return per_pixel_map(total / count, **sizes)  # type: ignore[arg-type]
    scores = per_pixel_map(total / count, **sizes, return_scores=True)[1]
    class_map = map_of_scores(scores, least)
    return (class_map, scores) if return_scores else class_map


@_in_float32
def panoptic_segments(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    valid_size: Size,
    target_size: Size,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    max_hole_share: float = 0.0,
    min_fragment_share: float = 0.0,
    rule: Rule = "exact",
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments without overlap: a pixel goes to the query with the highest class times mask probability.

    Args:
        class_queries_logits: (N, K + 1), no-object last.
        masks_queries_logits: (N, h, w).
        padded_size: what the network saw; sizes are (height, width).
        valid_size: the image in it.
        target_size: of the map.
        threshold: a query takes part if its best class is not no-object and has a probability above this.
        mask_threshold: a query's own mask is where its mask probability is at least this.
        overlap_mask_area_threshold: a query that gets fewer pixels than this part of its own mask is dropped,
            and its pixels are left without a segment.
        label_ids_to_fuse: classes (stuff) whose queries make one segment together.
        max_hole_share: parts of no segment, or of stuff, inside of a thing that have at most this part of its area
            become its own.
        min_fragment_share: parts of a segment, not of stuff, with less than this part of its area are dropped.
        rule: whose maps, see the head of this file.

    Returns:
        segmentation: (H, W) int32, 0 for no segment.
        segments_info: a record a segment: `id` (1, 2, ... in the order of the queries), `label_id`, `was_fused`
            (its class is in `label_ids_to_fuse`), `score` (class probability, the highest of fused queries),
            `area` (pixels with this id).

    Examples:
        >>> classes = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])  # two queries; K = 2 and no-object
        >>> masks = torch.tensor([[[8.0, -8.0]], [[-8.0, 8.0]]])  # of 1 x 2 pixels
        >>> sizes = {"padded_size": (1, 2), "valid_size": (1, 2), "target_size": (1, 2)}
        >>> segmentation, segments_info = panoptic_segments(classes, masks, **sizes)
        >>> segmentation.tolist(), [info["label_id"] for info in segments_info]
        ([[1, 2]], [0, 1])
    """
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    _check_fractions(overlap_mask_area_threshold=overlap_mask_area_threshold)
    _check_fractions(max_hole_share=max_hole_share, min_fragment_share=min_fragment_share)
    class_probs, mask_logits = _checked_pairs(class_queries_logits, masks_queries_logits)
    to_fuse = set() if label_ids_to_fuse is None else set(checked_label_ids(label_ids_to_fuse))
    maps = _by_rule(maps_of(mask_logits, padded_size, valid_size, target_size), rule)

    scores, labels = class_probs.cpu().max(-1)  # (N,), (N,); few: the host is done sooner
    kept = ((labels < class_probs.shape[1] - 1) & (scores > threshold)).nonzero()[:, 0]
    if len(kept) == 0:
        return torch.zeros(maps.sizes.target, dtype=torch.int32, device=mask_logits.device), []
    scores, labels, device = scores[kept], labels[kept], mask_logits.device
    mask_logits, mask_logit = mask_logits[kept.to(device)], _logit(mask_threshold)
    winners, areas, mask_areas = maps.assign_pixels(scores.to(device), mask_logits, mask_logit)
    pixels = areas
    if rule == "paper":
        winners = maps.own_winners(winners, mask_logits, mask_logit)
        pixels = winners.flatten().bincount(minlength=len(kept) + 1)[:-1]
    counts = torch.stack([areas, mask_areas, pixels]).tolist()
    suffices = operator.gt if rule == "transformers" else operator.ge  # of a share and the least one

    segments: dict[tuple[int, int | None], dict[str, Any]] = {}  # one a fused class, one a query of the others
    segment_ids = []
    for query, (score, label, won, mask_area, area) in enumerate(
        zip(scores.tolist(), labels.tolist(), *counts, strict=True)
    ):
        if area == 0 or mask_area == 0 or not suffices(won / mask_area, overlap_mask_area_threshold):
            segment_ids.append(0)
            continue
        fuse = label in to_fuse
        new = dict(id=len(segments) + 1, label_id=label, was_fused=fuse, score=score, area=0)
        segment = segments.setdefault((label, None if fuse else query), new)
        segment.update(score=max(segment["score"], score), area=segment["area"] + area)
        segment_ids.append(segment["id"])
    ids = torch.tensor([*segment_ids, 0], dtype=torch.int32, device=winners.device)
    segmentation = ids.index_select(0, winners.flatten()).view(winners.shape)
    return clean_map(segmentation, list(segments.values()), max_hole_share, min_fragment_share)


def class_segments(class_map: Tensor) -> dict[str, Any]:
    """A map of classes (H, W) as a panoptic one: each class that is there is a segment, in the order of the classes.

    Returns:
        `segmentation` (H, W) int32 and `segments_info` as [`panoptic_segments`], with a `score` of None.
    """
    labels, places, areas = class_map.unique(return_inverse=True, return_counts=True)
    segments = [
        dict(id=index, label_id=label, was_fused=True, score=None, area=area)
        for index, (label, area) in enumerate(zip(labels.tolist(), areas.tolist(), strict=True), start=1)
    ]
    return {"segmentation": places.to(torch.int32) + 1, "segments_info": segments}


@_in_float32
def instance_segments(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    valid_size: Size,
    target_size: Size,
    top_k: int = 100,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    as_map: bool = False,
    label_ids_to_fuse: Collection[int] | None = None,
    max_mask_iou: float = 1.0,
    max_hole_share: float = 0.0,
    min_fragment_share: float = 0.0,
    rule: Rule = "exact",
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Masks that may overlap: the best of the N x K pairs of query and class (as Mask2Former does).

    Args:
        max_hole_share: as for [`panoptic_segments`]; scores stay those of the masks before.
        min_fragment_share: as for [`panoptic_segments`].
        class_queries_logits: (N, K + 1), no-object last.
        masks_queries_logits: (N, h, w).
        padded_size: what the network saw; sizes are (height, width).
        valid_size: the image in it.
        target_size: of the map.
        top_k: how many pairs are looked at; a query can be among them with several classes. With the rule of
            transformers as many as there are queries.
        threshold: lowest score that is kept; never a score of 0.
        mask_threshold: a mask is where its probability is above this.
        as_map: return a map instead of the masks.
        label_ids_to_fuse: classes (stuff) that have no instances. None: none.
        max_mask_iou: of two masks of one class with an IoU above this the better stays. 1: all stay.
        rule: whose maps, see the head of this file.

    Returns:
        masks: (n, H, W) bool, best score first, none empty; or a map (H, W) int32 of the `id` of the best instance at
            each pixel, 0 where there is none.
        segments_info: a record a mask: `id` (1, 2, ...), `label_id`, `was_fused` (False), `score` (class
            probability times the mean mask probability inside the mask), `area` (pixels of the mask).

    Examples:
        >>> classes = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])  # two queries; K = 2 and no-object
        >>> masks = torch.tensor([[[8.0, -8.0]], [[-8.0, 8.0]]])  # of 1 x 2 pixels
        >>> sizes = {"padded_size": (1, 2), "valid_size": (1, 2), "target_size": (1, 2)}
        >>> found, segments_info = instance_segments(classes, masks, **sizes, label_ids_to_fuse=[0])
        >>> found.tolist(), [info["label_id"] for info in segments_info]
        ([[[False, True]]], [1])
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    clean_up = dict(max_mask_iou=max_mask_iou, max_hole_share=max_hole_share, min_fragment_share=min_fragment_share)
    _check_fractions(**clean_up)
    class_probs, mask_logits = _checked_pairs(class_queries_logits, masks_queries_logits)
    maps = _by_rule(maps_of(mask_logits, padded_size, valid_size, target_size), rule)
    mask_logit = _logit(mask_threshold)

    num_labels = class_probs.shape[1] - 1
    stuff = torch.tensor(checked_label_ids(label_ids_to_fuse or ()), dtype=torch.int64, device="cpu")
    class_probs = class_probs[:, :-1]
    if rule == "exact":  # before the best are taken, so that they are instances
        class_probs = class_probs.index_fill(1, stuff.to(class_probs.device), 0.0)
    pair_scores, pairs = class_probs.flatten().sort(descending=True, stable=True)
    top_k = len(class_probs) if rule == "transformers" else top_k
    pair_scores, pairs = pair_scores[:top_k].cpu(), pairs[:top_k].cpu()
    # The mask's factor can only lower a score. What has no probability at all is no instance, whatever the threshold.
    possible = (pair_scores >= threshold) & (pair_scores > 0) & ~torch.isin(pairs % num_labels, stuff)
    pair_scores, pairs = pair_scores[possible], pairs[possible]
    queries, mask_of_pair = (pairs // num_labels).unique(return_inverse=True)
    mask_logits = mask_logits[queries.to(mask_logits.device)]  # (n, h, w)
    areas, prob_sums = (values.cpu() for values in maps.mask_areas(mask_logits, mask_logit))
    mask_scores = prob_sums / areas.clamp(min=1)  # (n,)

    scores, order = (pair_scores * mask_scores[mask_of_pair]).sort(descending=True, stable=True)
    found = (scores >= threshold) & (areas[mask_of_pair[order]] > 0)
    scores, order = scores[found], order[found]
    best = mask_of_pair[order]
    labels, of_masks = (pairs[order] % num_labels).tolist(), areas[best].tolist()
    mask_logits = mask_logits[best.to(mask_logits.device)]
    kept = list(range(len(best)))
    if kept and clean_up != {"max_mask_iou": 1, "max_hole_share": 0, "min_fragment_share": 0}:
        found_masks, kept, of_masks = clean_instances(
            maps, mask_logits, mask_logit, labels, of_masks, **clean_up, as_map=as_map
        )
    else:
        found_masks = (maps.instance_map if as_map else maps.masks)(mask_logits, mask_logit)
    records = zip([labels[place] for place in kept], scores[kept].tolist(), of_masks, strict=True)
    segments = [
        dict(id=index, label_id=label, was_fused=False, score=score, area=area)
        for index, (label, score, area) in enumerate(records, start=1)
    ]
    return found_masks, segments


class OutputMapsMixin:
    """Where `target_sizes` [(height, width), ...] is None, maps have the sizes that the images had before resizing
    (`original_sizes` of the outputs), else their size in the network's input, else that of the logits.
    """

    label_ids_to_fuse: Collection[int] | None
    inference_defaults: dict[str, Any]

    def task_options(self, task: str, outputs: Any = None, **given: Any) -> dict[str, Any]:
        """The options of a task's post-processing: those given, else saved, else built in.

        transformers' pipeline gives its own defaults where its user gives nothing, and then `outputs` hold its
        `target_size`: from there, these values count as not given. (Where the package is installed, its pipeline knows
        what was given; see hub/pipeline.py.)
        """
        if getattr(outputs, "target_size", None) is not None:
            given = {name: value for name, value in given.items() if value != PIPELINE_OPTIONS.get(name)}
        return task_options(defaults_of(self), task, given)

    def _stuff(self, given: Collection[int] | None) -> list[int]:
        stuff = self.label_ids_to_fuse if given is None else given
        return [] if stuff is None else checked_label_ids(stuff)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: TargetSizes = None,
        return_segmentation_scores: bool = False,
        score_threshold: float | None = None,
        rule: Rule | None = None,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Class of each pixel.

        Args:
            outputs: of a mask-classification model, or of a per-pixel model (`logits`).
            target_sizes: one (height, width) for each image.
            return_segmentation_scores: also return the scores behind the map.
            score_threshold: a pixel whose highest class score is not above this is of no class, -1. None: as saved,
                else 0.5 for a model with one class, which would fill the map, and 0 for others: each pixel has a class.
                Without effect on per-pixel models.
            rule: "exact", "transformers" or "paper": whose maps, see the head of this file. None: as saved, else the
                image processor's `compatibility`. With it change the options that are not given.

        Returns:
            One (H, W) int64 map an image, or, with scores, one record with `segmentation` (H, W) and
            `segmentation_scores` (K, H, W).
        """
        pairs = not classifies_pixels(outputs)
        to_map: Any = per_pixel_map
        if pairs:
            options = self.task_options("semantic", outputs, score_threshold=score_threshold, rule=rule)
            to_map = partial(semantic_map, **options)
        maps: list[Any] = []
        images: Any = _images(outputs, target_sizes, pairs)
        if _in_windows(outputs):
            images = _windowed_images(outputs, target_sizes)
            to_map = partial(map_of_windows, **options)
        for *logits, sizes in images:
            result = to_map(*logits, **sizes, return_scores=return_segmentation_scores)
            if return_segmentation_scores:
                fields = zip(("segmentation", "segmentation_scores"), result, strict=True)
                maps.append(SemanticSegmentationPostProcessorOutput(dict(fields)))
            else:
                maps.append(result)
        return maps

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: TargetSizes = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
        label_ids_to_fuse: Collection[int] | None = None,
        max_mask_iou: float | None = None,
        max_hole_share: float | None = None,
        min_fragment_share: float | None = None,
        rule: Rule | None = None,
    ) -> list[dict[str, Any]]:
        """Scored instances, which may overlap.

        Args:
            outputs: of a mask-classification model.
            target_sizes: one (height, width) for each image. None: those before resizing, where the outputs have them.
            threshold: lowest score that is kept. None, for all options: as saved in `inference_defaults`, else 0.5.
            mask_threshold: mask probability from which a pixel belongs to a mask.
            overlap_mask_area_threshold: part of transformers' signature; instances overlap, so it has no use.
            return_coco_annotation: masks as COCO run-length encodings, which pycocotools reads.
            return_binary_maps: masks as one tensor.
            label_ids_to_fuse: classes that have no instances: stuff and background. None: `self.label_ids_to_fuse`; an
                empty set: none, as in the paper's code.
            max_mask_iou: of two masks of one class with an IoU above this, which are one object, the better stays. 1:
                all stay, as in the paper's code.
            max_hole_share: holes of a mask of at most this part of its area are filled; 0: none.
            min_fragment_share: parts of a mask with less than this part of its area are dropped; 0: none.
            rule: as for semantic maps.

        Returns:
            For each image `segments_info` (id from 0, label_id, was_fused, score, area; best score first) and
            `segmentation`: an (H, W) int32 map of ids, -1 where there is no instance and the best instance where
            they overlap; or, in the order of `segments_info`, a list of n RLE dicts, or (n, H, W) bool.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps exclude each other.")
        options = self.task_options(
            "instance",
            outputs,
            threshold=threshold,
            mask_threshold=mask_threshold,
            max_mask_iou=max_mask_iou,
            max_hole_share=max_hole_share,
            min_fragment_share=min_fragment_share,
            rule=rule,
        )
        stuff = self._stuff(label_ids_to_fuse)
        results = []
        for *logits, sizes in _images(outputs, target_sizes):
            as_map = not (return_coco_annotation or return_binary_maps)
            segmentation: Any
            _check_labels(stuff, logits[0])
            segmentation, segments_info = instance_segments(
                logits[0], logits[1], **sizes, **options, as_map=as_map, label_ids_to_fuse=stuff
            )
            segments_info = [info | {"id": i} for i, info in enumerate(segments_info)]
            if as_map:
                segmentation -= 1
            elif return_coco_annotation:
                segmentation = [mask_to_coco_rle(mask) for mask in segmentation]
            results.append({"segmentation": segmentation, "segments_info": segments_info})
        return results

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: TargetSizes = None,
        max_hole_share: float | None = None,
        min_fragment_share: float | None = None,
        rule: Rule | None = None,
    ) -> list[dict[str, Any]]:
        """Segments that do not overlap (paper, Section 3.4).

        Args:
            outputs: of a mask-classification model, or of a per-pixel model (`logits`).
            target_sizes: one (height, width) for each image. None: those before resizing, where the outputs have them.
            threshold: lowest class probability of a segment. None, for all thresholds: as saved in
                `inference_defaults`, else as in transformers, 0.5, 0.5 and 0.8.
            mask_threshold: mask probability from which a pixel counts to a mask's own area.
            overlap_mask_area_threshold: part of its own area that a segment must win.
            label_ids_to_fuse: classes of which one segment is made; None: `self.label_ids_to_fuse`; an empty set
                fuses nothing.
            max_hole_share: parts of no segment, or of stuff, inside of a thing that have at most this part of its area
                become its own; 0: none.
            min_fragment_share: parts of a segment, not of stuff, with less than this part of its area are dropped; 0:
                none.
            rule: as for semantic maps.

        Returns:
            For each image `segmentation`, an (H, W) int32 map of ids, 0 where there is no segment, and
            `segments_info` (id from 1, label_id, was_fused, score, area). Of a per-pixel model each class is one
            segment, whatever the thresholds, and has no score (None).
        """
        if classifies_pixels(outputs):
            maps: list[Any] = self.post_process_semantic_segmentation(outputs, target_sizes)
            return [class_segments(class_map) for class_map in maps]
        fuse = self._stuff(label_ids_to_fuse)
        options = self.task_options(
            "panoptic",
            outputs,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            max_hole_share=max_hole_share,
            min_fragment_share=min_fragment_share,
            rule=rule,
        )
        results = []
        for *logits, sizes in _images(outputs, target_sizes):
            _check_labels(fuse, logits[0])
            segmentation, segments_info = panoptic_segments(
                logits[0], logits[1], **sizes, **options, label_ids_to_fuse=fuse
            )
            results.append({"segmentation": segmentation, "segments_info": segments_info})
        return results


def _check_labels(label_ids: Sequence[int], class_queries_logits: Tensor) -> None:
    num_labels = class_queries_logits.shape[-1] - 1
    if outside := [label for label in label_ids if label >= num_labels]:
        raise ValueError(f"label_ids_to_fuse: the model has classes 0 to {num_labels - 1}, not {outside}.")


def classifies_pixels(outputs: Any) -> bool:
    """Whether these are the outputs of a per-pixel model, which knows classes but no segments."""
    return getattr(outputs, "class_queries_logits", None) is None and getattr(outputs, "logits", None) is not None


def _in_windows(outputs: Any) -> bool:
    """Whether these are of windows of images; transformers' EoMT names none, where there are none."""
    offsets = getattr(outputs, "patch_offsets", None)
    return offsets is not None and len(offsets) > 0


def _images(outputs: Any, target_sizes: TargetSizes, pairs: bool = True) -> Iterator[tuple[Any, ...]]:
    """For each image its logits, then the keyword arguments of all functions in post_processing.py.

    Of an image in windows the pairs of all its windows, whose masks are empty beyond their window.
    """
    give_back_memory()
    if _in_windows(outputs):
        for windows, sizes in _windowed_images(outputs, target_sizes):
            size = sizes["size"]
            masks = [window.pasted(size) for window in windows]
            whole = {"padded_size": size, "valid_size": size, "target_size": sizes["target_size"]}
            yield torch.cat([window.logits[0] for window in windows]), torch.cat(masks), whole
        return
    names = ("class_queries_logits", "masks_queries_logits") if pairs else ("logits",)
    logits: list[Any] = [getattr(outputs, name, None) for name in names]
    if any(tensor is None for tensor in logits):
        raise ValueError(
            f"the outputs ({type(outputs).__name__}) have no {' and '.join(names)}. Outputs of a per-pixel model make "
            "semantic maps: post_process_semantic_segmentation, or subtask='semantic' in a pipeline."
        )
    count, logit_size = len(logits[0]), tuple(logits[-1].shape[-2:])
    padded, valid, original = (
        _size_list(getattr(outputs, name, None)) for name in ("padded_sizes", "valid_sizes", "original_sizes")
    )
    if padded is None or valid is None:
        padded = valid = [logit_size] * count
    if not pairs:
        padded = [_stride_multiple(size, logit_size) for size in padded]
    target = next(sizes for sizes in (_size_list(target_sizes), original, valid) if sizes is not None)
    if len(target) != count:
        raise ValueError(f"{len(target)} target_sizes for {count} images; give one (height, width) for each.")
    for i in range(count):
        sizes = {"padded_size": padded[i], "valid_size": valid[i], "target_size": target[i]}
        yield *(tensor[i] for tensor in logits), sizes


@dataclass(frozen=True)
class Window:
    """A part of an image that the network saw: its pairs, sizes as for [`semantic_map`], and its place (rows, columns)
    in the image.
    """

    logits: tuple[Tensor, Tensor]
    sizes: dict[str, Any]
    place: tuple[slice, slice]

    def pasted(self, size: Size) -> Tensor:
        """Mask logits (N, *size), far below 0 beyond the window."""
        logits = self.logits[1].detach().float()
        masks = logits.new_full((len(logits), *size), OUTSIDE)
        maps = PlainMaps(ResizeGeometry.checked(logits, **self.sizes))
        masks[(slice(None), *self.place)] = maps.to_padded_size(logits)
        return masks


def _windowed_images(outputs: Any, target_sizes: TargetSizes) -> Iterator[tuple[list[Window], dict[str, Any]]]:
    """For each image its windows, its `size` as they were cut out of it, and its `target_size`."""
    give_back_memory()
    offsets = [tuple(offset) for offset in plain(outputs.patch_offsets)]
    sizes: Any = {n: _size_list(getattr(outputs, f"{n}s", None)) for n in ("padded_size", "valid_size")}
    target, original = _size_list(target_sizes), _size_list(getattr(outputs, "original_sizes", None))
    shapes: Any = original or target  # which side is longer
    targets: Any = target or original
    count = 1 + max(image for image, *_ in offsets)
    if len(offsets) != len(outputs.class_queries_logits) or any(s and len(s) != count for s in (target, original)):
        raise ValueError(
            f"{len(outputs.class_queries_logits)} outputs of {len(offsets)} windows (patch_offsets) of {count} images; "
            "target_sizes and original_sizes are those of images."
        )
    for i in range(count):
        windows, size = [], (0, 0)
        for place, (image, start, end) in enumerate(offsets):
            if image != i:
                continue
            square = (end - start, end - start)  # of a window of other models, which do not say
            seen = {name: square if known is None else known[place] for name, known in sizes.items()}
            height, width = seen["valid_size"]
            tall = bool(shapes) and shapes[i][0] > shapes[i][1]
            rows, columns = (slice(start, end), slice(width)) if tall else (slice(height), slice(start, end))
            size = (max(size[0], rows.stop), max(size[1], columns.stop))
            logits = (outputs.class_queries_logits[place], outputs.masks_queries_logits[place])
            windows.append(Window(logits, {**seen, "target_size": seen["valid_size"]}, (rows, columns)))
        yield windows, {"size": size, "target_size": targets[i] if targets else size}


def _stride_multiple(size: tuple[int, int], cells: tuple[int, ...]) -> tuple[int, int]:
    """To what size the paper's code upsamples the logits of its baselines: by their stride, even past the input."""
    height, width = (-(-pixels // number) * number for pixels, number in zip(size, cells, strict=True))
    return height, width


def _size_list(sizes: TargetSizes) -> list[tuple[int, int]] | None:
    if sizes is None:
        return None
    sizes = plain(sizes)
    try:
        return [(operator.index(height), operator.index(width)) for height, width in sizes]
    except (TypeError, ValueError) as error:
        raise ValueError(f"target_sizes must be (height, width) for each image, integers, got {sizes!r}.") from error


def _checked_pairs(class_queries_logits: Tensor, masks_queries_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, K+1) and mask logits (N, h, w), float32, without NaN."""
    classes, masks = tuple(class_queries_logits.shape), tuple(masks_queries_logits.shape)
    if len(classes) != 2 or len(masks) != 3 or classes[0] != masks[0] or classes[1] < 2 or 0 in masks[1:]:
        raise ValueError(
            "class_queries_logits and masks_queries_logits of one image must be (N, K+1) and (N, h, w) with one N "
            f"and K >= 1, got {classes} and {masks}"
        )
    class_probs = class_queries_logits.detach().float().softmax(-1)  # a logit of -inf is a probability of 0
    mask_logits = masks_queries_logits.detach().float()
    if not math.isfinite(class_probs.sum() + mask_logits.sum()):  # one wait for the device; true also for huge logits
        if not bool(class_probs.isfinite().all()):
            _check_finite("class_queries_logits", class_queries_logits)
        _check_finite("masks_queries_logits", mask_logits)
    return class_probs, mask_logits


def _check_finite(name: str, logits: Tensor) -> None:
    if bad := int((~logits.isfinite()).sum()):
        raise ValueError(
            f"{bad} of the {logits.numel()} values of {name} are NaN or infinite: weights or pixel values are "
            "damaged, or half precision overflowed (then run the model in bfloat16 or float32)"
        )


def _checked_size(size: Size, name: str) -> tuple[int, int]:
    try:
        values = tuple(operator.index(value) for value in size)
    except TypeError as error:
        raise TypeError(f"{name} must be (height, width), two integers, got {size!r}") from error
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{name} must be (height, width), two positive integers, got {values}")
    return values[0], values[1]


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, str) or value is None or not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def _logit(probability: float) -> float:
    return float(torch.tensor(probability, dtype=torch.float64, device="cpu").logit())


def _trim_of_glibc() -> Callable[[int], Any] | None:
    """None where the C library is another one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" and STATM.exists() else None


_trim = _trim_of_glibc()
_resident = 0  # bytes; the least since the last trim


def give_back_memory() -> None:
    """Where the process has grown by more than `GROWTH` since the last time, hand freed memory back to the system.

    glibc keeps what lies between blocks in use: with images of many sizes that is more and more. No setting of it is
    changed, and most calls only read a number.
    """
    global _resident
    if _trim is None:
        return
    resident = _resident_bytes()
    if resident > _resident + GROWTH:
        _trim(0)
        _resident = _resident_bytes()
    else:
        _resident = min(_resident, resident)


def _resident_bytes() -> int:
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")

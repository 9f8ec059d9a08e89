"""Probability-mask pairs of one image -> semantic, panoptic and instance maps (paper Section 3.4).

Every function takes the predictions of ONE image (K classes, N queries), `class_queries_logits` (N, K+1) with
no-object last and `masks_queries_logits` (N, h, w), and three sizes (height, width):
- `padded_size`: what the network saw, padding included; logits are upsampled to it;
- `valid_size`: the image in it; the padding at the bottom and the right is cropped;
- `target_size`: (H, W), the size of the map that is returned.

Both resizes are bilinear with `align_corners=False`. The work is done in float32 whatever the dtype of the logits.
reference_maps.py does these steps for whole maps, one after the other. Here they are done in tiles, and in a tile only
for the classes or queries that can win there (contenders.py); the result is the same, to the rounding of float32.

Errors: ValueError for NaN or infinite logits, shapes that do not belong together, sizes that are not positive,
an image larger than its padded size, thresholds outside [0, 1]; TypeError for sizes that are not two integers.
"""

from collections.abc import Callable, Collection, Iterator
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from .contenders import contenders, corner_bounds, draw_greatest, indices_by_place, leads
from .options import checked_label_ids
from .resizing import MapFrame, Size, Tile, TileGrid

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_float32(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Without autocast, which would make the products below in half precision."""

    @wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@in_float32
def semantic_map(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    valid_size: Size,
    target_size: Size,
    return_scores: bool = False,
    resize: Literal["scores", "logits"] = "scores",
) -> Tensor | tuple[Tensor, Tensor]:
    """The class with the highest score: the sum over the queries of class probability times mask probability.

    Args:
        return_scores: also return the scores, (K, H, W) float32. As sums over queries they can exceed 1.
        resize: what is resized to `target_size`: class scores made at the padded size ("scores": the paper's
            semantic configurations) or mask logits ("logits": its panoptic configurations).

    Returns:
        The map (H, W) int64, or (map, scores).
    """
    if resize not in ("scores", "logits"):
        raise ValueError(f'resize must be "scores" or "logits", got {resize!r}')
    class_probs, mask_logits = _checked_pairs(class_queries_logits, masks_queries_logits)
    frame = MapFrame.checked(mask_logits, padded_size, valid_size, target_size)
    by_class = class_probs[:, :-1].T.contiguous()  # (K, N)

    def scores_of(logits: Tensor, classes: Tensor) -> Tensor:  # (N, ...) -> (k, ...)
        return (by_class[classes] @ logits.sigmoid().flatten(1)).unflatten(1, logits.shape[1:])

    return _map_of_greatest(mask_logits, scores_of, len(by_class), frame, resize, return_scores)


@in_float32
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
        logits: (K, h, w).
        return_scores: also return the resized logits, (K, H, W) float32.

    Returns:
        The map (H, W) int64, or (map, logits).
    """
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(f"logits of one image must be (K, h, w), none of them 0, got {tuple(logits.shape)}")
    logits = _finite(logits, "logits")
    frame = MapFrame.checked(logits, padded_size, valid_size, target_size)
    return _map_of_greatest(logits, lambda maps, classes: maps[classes], len(logits), frame, "scores", return_scores)


def _map_of_greatest(
    maps: Tensor,
    scores_of: Callable[[Tensor, Tensor], Tensor],
    num_labels: int,
    frame: MapFrame,
    resize: str,
    return_scores: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class with the greatest score at each pixel; `scores_of(maps, classes)` makes scores of `maps`, and grows
    with each of them."""
    segmentation = maps.new_empty(frame.target, dtype=torch.int64)
    all_classes = torch.arange(num_labels, device=maps.device)
    tiles = frame.tiles(len(maps) + num_labels, maps.device)
    if return_scores:
        all_scores = maps.new_empty(num_labels, *frame.target)
        for tile in tiles:
            logits = tile.at_padded_size(tile.window(maps))
            if resize == "scores":
                scores = tile.at_target_size(scores_of(logits, all_classes))
            else:
                scores = scores_of(tile.at_target_size(logits), all_classes)
            draw_greatest(segmentation[tile.target], scores, all_classes)
            all_scores[:, tile.rows.target, tile.columns.target] = scores
        return segmentation, all_scores

    for tile, classes in _contended_tiles(maps, tiles, lambda bound: scores_of(bound, all_classes)):
        if len(classes) == 1:
            segmentation[tile.target] = classes
            continue
        logits = tile.at_padded_size(tile.window(maps))
        if resize == "scores":
            scores = scores_of(logits, classes)
            left = contenders(*corner_bounds(scores))
            scores, classes = tile.at_target_size(scores[left]), classes[left]
        else:
            classes = classes[contenders(*(scores_of(bound, classes) for bound in corner_bounds(logits)))]
            scores = scores_of(tile.at_target_size(logits), classes)
        draw_greatest(segmentation[tile.target], scores, classes)
    return segmentation


def _contended_tiles(
    maps: Tensor, tiles: TileGrid, scores_of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile, and which scores can be the greatest in it by their bounds between the cells of `maps`."""
    for rows in tiles.rows:
        least, most = (scores_of(bound) for bound in corner_bounds(maps[:, rows.source]))
        can_win = tiles.extremes(torch.amax, leads(least, most)) >= 0
        yield from zip(tiles.in_row(rows), indices_by_place(can_win), strict=True)


@in_float32
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
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments without overlap: a pixel goes to the query with the highest class times mask probability.

    Args:
        threshold: a query takes part if its best class is not no-object and has a probability above this.
        mask_threshold: a query's own mask is where its mask probability is at least this.
        overlap_mask_area_threshold: a query that gets fewer pixels than this part of its own mask is dropped,
            and its pixels are left without a segment.
        label_ids_to_fuse: classes (stuff) whose queries make one segment together.

    Returns:
        segmentation: (H, W) int32, 0 for no segment.
        segments_info: a record a segment: `id` (1, 2, ... in the order of the queries), `label_id`, `was_fused`
            (its class is in `label_ids_to_fuse`), `score` (class probability, the highest of fused queries),
            `area` (pixels with this id).
    """
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    _check_fractions(overlap_mask_area_threshold=overlap_mask_area_threshold)
    class_probs, mask_logits = _checked_pairs(class_queries_logits, masks_queries_logits)
    to_fuse = set() if label_ids_to_fuse is None else set(checked_label_ids(label_ids_to_fuse))
    frame = MapFrame.checked(mask_logits, padded_size, valid_size, target_size)

    scores, labels = class_probs.max(-1)
    kept = (labels < class_probs.shape[1] - 1) & (scores > threshold)
    scores, labels, mask_logits = scores[kept], labels[kept], mask_logits[kept]  # (n,), (n,), (n, h, w)
    if len(scores) == 0:
        return torch.zeros(frame.target, dtype=torch.int32, device=mask_logits.device), []

    winners, own_areas = _winners(scores, mask_logits, frame, _logit(mask_threshold))
    won_areas = winners.flatten().bincount(minlength=len(scores))
    segments: dict[tuple[int, int | None], dict[str, Any]] = {}  # one a fused class, one a query of the others
    segment_ids = torch.zeros(len(scores), dtype=torch.int32, device="cpu")
    queries = zip(labels.tolist(), scores.tolist(), won_areas.tolist(), own_areas.tolist(), strict=True)
    for query, (label, score, won, own) in enumerate(queries):
        if won == 0 or own == 0 or won / own < overlap_mask_area_threshold:
            continue
        fuse = label in to_fuse
        new = dict(id=len(segments) + 1, label_id=label, was_fused=fuse, score=score, area=0)
        segment = segments.setdefault((label, None if fuse else query), new)
        segment.update(score=max(segment["score"], score), area=segment["area"] + won)
        segment_ids[query] = segment["id"]
    segmentation = segment_ids.to(winners.device).index_select(0, winners.flatten()).view(frame.target)
    return segmentation, list(segments.values())


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


def _winners(scores: Tensor, mask_logits: Tensor, frame: MapFrame, mask_logit: float) -> tuple[Tensor, Tensor]:
    """Of n queries with class scores (n,) the index that a pixel goes to (H, W), and the areas (n,) of their own masks:
    where their logit is at least `mask_logit`."""
    winners = torch.empty(frame.target, dtype=torch.int32, device=mask_logits.device)
    tiles = frame.tiles(len(scores), mask_logits.device)
    own_areas = torch.zeros(len(scores), dtype=torch.int64, device=mask_logits.device)
    weights = scores[:, None, None]
    for rows in tiles.rows:
        bounds = corner_bounds(mask_logits[:, rows.source])
        can_win = tiles.extremes(torch.amax, leads(*(bound.sigmoid() * weights for bound in bounds))) >= 0  # (n, T)
        least, most = tiles.extremes(torch.amin, bounds[0]), tiles.extremes(torch.amax, bounds[1])
        crossed = (least < mask_logit) & (most >= mask_logit)  # by the outline of a mask
        settled = ((can_win.sum(0) == 1) & ~crossed.any(0)).tolist()
        in_row = tiles.in_row(rows)
        areas = torch.tensor([tile.area for tile in in_row], device=own_areas.device)
        own_areas += ((least >= mask_logit) * areas).sum(1)  # without tiles that are crossed
        by_tile = zip(in_row, indices_by_place(can_win | crossed), settled, crossed.T, strict=True)
        for tile, queries, is_settled, is_crossed in by_tile:
            if is_settled:
                winners[tile.target] = queries
                continue
            logits = tile.at_padded_size(tile.window(mask_logits)[queries])
            left = contenders(*corner_bounds(logits.sigmoid() * weights[queries])) | is_crossed[queries]
            left = left.nonzero()[:, 0]
            queries, logits = queries[left], tile.at_target_size(logits[left])
            own_areas.index_add_(0, queries, (logits >= mask_logit).sum((1, 2)) * is_crossed[queries])
            draw_greatest(winners[tile.target], logits.sigmoid() * weights[queries], queries)
    return winners, own_areas


@in_float32
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
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Masks that may overlap: the best of the N x K pairs of query and class (as Mask2Former does).

    Args:
        top_k: how many pairs are looked at; a query can be among them with several classes.
        threshold: lowest score that is kept; never a score of 0.
        mask_threshold: a mask is where its probability is above this.
        as_map: return a map instead of the masks.

    Returns:
        masks: (n, H, W) bool, best score first, none empty; or a map (H, W) int32 of the `id` of the best instance at
            each pixel, 0 where there is none.
        segments_info: a record a mask: `id` (1, 2, ...), `label_id`, `was_fused` (False), `score` (class
            probability times the mean mask probability inside the mask), `area` (pixels of the mask).
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    class_probs, mask_logits = _checked_pairs(class_queries_logits, masks_queries_logits)
    frame = MapFrame.checked(mask_logits, padded_size, valid_size, target_size)
    mask_logit = _logit(mask_threshold)

    num_labels = class_probs.shape[1] - 1
    pair_scores, pairs = class_probs[:, :-1].flatten().sort(descending=True, stable=True)
    # The mask's factor can only lower a score. What has no probability at all is no instance, whatever the threshold.
    count = min(top_k, int(((pair_scores >= threshold) & (pair_scores > 0)).sum()))
    pair_scores, pairs = pair_scores[:count].cpu(), pairs[:count]
    queries, mask_of_pair = (pairs // num_labels).unique(return_inverse=True)

    mask_logits = mask_logits[queries]  # (n, h, w)
    # Masks are made twice, first to score them: at the target size they would not all fit the memory.
    areas = torch.zeros(len(queries), dtype=torch.int64, device="cpu")
    prob_sums = torch.zeros(len(queries), dtype=torch.float64, device="cpu")
    for _, present, logits in _masks_in_tiles(mask_logits, frame, mask_logit):
        inside = logits > mask_logit
        areas[present.cpu()] += inside.sum((1, 2)).cpu()
        prob_sums[present.cpu()] += (logits.sigmoid() * inside).sum((1, 2)).cpu()
    mask_scores = prob_sums / areas.clamp(min=1)

    labels, mask_of_pair = (pairs % num_labels).cpu(), mask_of_pair.cpu()
    scores, order = (pair_scores * mask_scores[mask_of_pair]).sort(descending=True, stable=True)
    found = (scores >= threshold) & (areas[mask_of_pair[order]] > 0)
    scores, order = scores[found], order[found]
    best = mask_of_pair[order]
    records = zip(labels[order].tolist(), scores.tolist(), areas[best].tolist(), strict=True)
    segments = [
        dict(id=index, label_id=label, was_fused=False, score=score, area=area)
        for index, (label, score, area) in enumerate(records, start=1)
    ]
    draw = _instance_map if as_map else _binary_masks
    return draw(mask_logits[best.to(mask_logits.device)], frame, mask_logit), segments


def _masks_in_tiles(mask_logits: Tensor, frame: MapFrame, mask_logit: float) -> Iterator[tuple[Tile, Tensor, Tensor]]:
    """Each tile where masks can have pixels, the indices of these masks (k,), and their logits in it (k, H, W)."""
    tiles = frame.tiles(len(mask_logits), mask_logits.device)
    for rows in tiles.rows:
        _, most = corner_bounds(mask_logits[:, rows.source])
        is_present = tiles.extremes(torch.amax, most) > mask_logit
        for tile, present in zip(tiles.in_row(rows), indices_by_place(is_present), strict=True):
            if len(present):
                yield tile, present, tile.at_target_size(tile.at_padded_size(tile.window(mask_logits)[present]))


def _binary_masks(mask_logits: Tensor, frame: MapFrame, mask_logit: float) -> Tensor:
    shape = (len(mask_logits), *frame.target)
    if mask_logits.device.type == "cpu":
        masks = torch.from_numpy(np.zeros(shape, dtype=bool))  # pages that stay empty take neither memory nor time
    else:
        masks = torch.zeros(shape, dtype=torch.bool, device=mask_logits.device)
    for tile, present, logits in _masks_in_tiles(mask_logits, frame, mask_logit):
        masks[present, tile.rows.target, tile.columns.target] = logits > mask_logit
    return masks


def _instance_map(mask_logits: Tensor, frame: MapFrame, mask_logit: float) -> Tensor:
    ids = torch.zeros(frame.target, dtype=torch.int32, device=mask_logits.device)
    for tile, present, logits in _masks_in_tiles(mask_logits, frame, mask_logit):
        inside, of_tile = logits > mask_logit, ids[tile.target]
        for index in reversed(range(len(present))):  # the best is drawn last
            of_tile.masked_fill_(inside[index], present[index] + 1)
    return ids


def _checked_pairs(class_queries_logits: Tensor, masks_queries_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, K+1) and mask logits (N, h, w), float32, without NaN."""
    classes, masks = tuple(class_queries_logits.shape), tuple(masks_queries_logits.shape)
    if len(classes) != 2 or len(masks) != 3 or classes[0] != masks[0] or classes[1] < 2 or 0 in masks[1:]:
        raise ValueError(
            "class_queries_logits and masks_queries_logits of one image must be (N, K+1) and (N, h, w) with one N "
            f"and K >= 1, got {classes} and {masks}"
        )
    class_probs = class_queries_logits.detach().float().softmax(-1)  # a logit of -inf is a probability of 0
    if not bool(class_probs.isfinite().all()):
        _finite(class_queries_logits, "class_queries_logits")
    return class_probs, _finite(masks_queries_logits, "masks_queries_logits")


def _finite(logits: Tensor, name: str) -> Tensor:
    logits = logits.detach().float()
    if logits.numel() and not bool(logits.amin().isfinite() & logits.amax().isfinite()):
        bad = int((~logits.isfinite()).sum())
        raise ValueError(
            f"{bad} of the {logits.numel()} values of {name} are NaN or infinite: weights or pixel values are "
            "damaged, or half precision overflowed (then run the model in bfloat16 or float32)"
        )
    return logits


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, str) or value is None or not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def _logit(probability: float) -> float:
    return float(torch.tensor(probability, dtype=torch.float64, device="cpu").logit())

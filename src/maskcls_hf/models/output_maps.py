"""The `post_process_*` methods of the image processor: outputs of a batch -> maps at the size of each image.

Names, arguments and returned fields are those of transformers' MaskFormer; the rules are in post_processing.py.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .memory import give_back_memory
from .options import checked_label_ids, plain
from .post_processing import (
    class_segments,
    instance_segments,
    panoptic_segments,
    per_pixel_map,
    semantic_map,
)
from .run_lengths import mask_to_coco_rle

TargetSizes = Sequence[tuple[int, int]] | Tensor | None


class OutputMapsMixin:
    """Where `target_sizes` [(height, width), ...] is None, maps have the sizes that the images had before resizing
    (`original_sizes` of the outputs), else their size in the network's input, else that of the logits.
    """

    label_ids_to_fuse: Collection[int] | None

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: TargetSizes = None, return_segmentation_scores: bool = False
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Class of each pixel.

        Args:
            outputs: of a mask-classification model, or of a per-pixel model (`logits`).
            target_sizes: one (height, width) for each image.
            return_segmentation_scores: also return the scores behind the map.

        Returns:
            One (H, W) int64 map an image, or, with scores, one record with `segmentation` (H, W) and
            `segmentation_scores` (K, H, W).
        """
        pairs = not classifies_pixels(outputs)
        to_map = semantic_map if pairs else per_pixel_map
        maps: list[Any] = []
        for *logits, sizes in _images(outputs, target_sizes, pairs):
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
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: TargetSizes = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
    ) -> list[dict[str, Any]]:
        """Scored instances, which may overlap.

        Args:
            threshold: lowest score that is kept.
            mask_threshold: mask probability from which a pixel belongs to a mask.
            overlap_mask_area_threshold: part of transformers' signature; instances overlap, so it has no use.
            return_coco_annotation: masks as COCO run-length encodings, which pycocotools reads.
            return_binary_maps: masks as one tensor.

        Returns:
            For each image `segments_info` (id from 0, label_id, was_fused, score, area; best score first) and
            `segmentation`: an (H, W) int32 map of ids, -1 where there is no instance and the best instance where
            they overlap; or, in the order of `segments_info`, a list of n RLE dicts, or (n, H, W) bool.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps exclude each other.")
        results = []
        for *logits, sizes in _images(outputs, target_sizes):
            as_map = not (return_coco_annotation or return_binary_maps)
            segmentation: Any
            segmentation, segments_info = instance_segments(
                *logits, **sizes, threshold=threshold, mask_threshold=mask_threshold, as_map=as_map
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
        threshold: float = 0.8,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: TargetSizes = None,
    ) -> list[dict[str, Any]]:
        """Segments that do not overlap (paper, Section 3.4). Its `threshold` is the paper's, transformers' is 0.5.

        Args:
            threshold: lowest class probability of a segment.
            mask_threshold: mask probability from which a pixel counts to a mask's own area.
            overlap_mask_area_threshold: part of its own area that a segment must win.
            label_ids_to_fuse: classes of which one segment is made; None: `self.label_ids_to_fuse`; an empty set
                fuses nothing.

        Returns:
            For each image `segmentation`, an (H, W) int32 map of ids, 0 where there is no segment, and
            `segments_info` (id from 1, label_id, was_fused, score, area). Of a per-pixel model each class is one
            segment, whatever the thresholds, and has no score (None).
        """
        if classifies_pixels(outputs):
            maps: list[Any] = self.post_process_semantic_segmentation(outputs, target_sizes)
            return [class_segments(class_map) for class_map in maps]
        fuse = self.label_ids_to_fuse if label_ids_to_fuse is None else label_ids_to_fuse
        results = []
        for *logits, sizes in _images(outputs, target_sizes):
            num_labels = logits[0].shape[-1] - 1
            if outside := [label for label in checked_label_ids(() if fuse is None else fuse) if label >= num_labels]:
                raise ValueError(f"label_ids_to_fuse: the model has classes 0 to {num_labels - 1}, not {outside}.")
            segmentation, segments_info = panoptic_segments(
                *logits,
                **sizes,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                label_ids_to_fuse=fuse,
            )
            results.append({"segmentation": segmentation, "segments_info": segments_info})
        return results


def classifies_pixels(outputs: Any) -> bool:
    """Whether these are the outputs of a per-pixel model, which knows classes but no segments."""
    return getattr(outputs, "class_queries_logits", None) is None and getattr(outputs, "logits", None) is not None


def _images(outputs: Any, target_sizes: TargetSizes, pairs: bool = True) -> Iterator[tuple[Any, ...]]:
    """For each image its logits, then the keyword arguments of all functions in post_processing.py."""
    give_back_memory()
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

"""One annotated image, as every reader gives it."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision import tv_tensors
from typing_extensions import NotRequired

from ..models.segments import VOID, Segments, void_id_of

__all__ = ["VOID", "Sample", "segments_of", "void_id_of", "void_value", "without_absent"]


class Sample(TypedDict):
    """One annotated image; targets stay this compact until the loss.

    Args:
        image: (3, H, W) uint8; of a 16-bit file float32 on the same scale of 0..255, so that nothing is lost.
        segmentation_map: a map of ids (1, H, W), uint8 or int32; or, where segments overlap, a stack (M, H, W) bool.
        instance_id_to_semantic_id: id of a segment (in a stack its place, from 0) -> class in 0..K-1, `VOID` for
            unlabeled pixels, None for no segment. None instead of a dict: the ids are classes, and the data set's
            `void_id` marks unlabeled pixels. A segment without a pixel is no target, but scores count it as not found.
        crowd_ids: ids of crowd regions: many instances in one. Training sees them as void, scores as COCO does.
        name: of the image, for messages and results.
        areas: id -> pixels of a segment as the file states them, by which COCO tells small, medium and large apart.
            They hold for the whole image: crops and augmentation leave them out. Absent: those of the masks.
    """

    image: tv_tensors.Image
    segmentation_map: tv_tensors.Mask
    instance_id_to_semantic_id: dict[int, int | None] | None
    crowd_ids: list[int]
    name: str
    areas: NotRequired[dict[int, float]]


def without_absent(sample: Sample) -> Sample:
    """The same without the segments that have no pixel, such as those outside of a crop: scores would miss them."""
    pixels, classes = sample["segmentation_map"].as_subclass(torch.Tensor), sample["instance_id_to_semantic_id"]
    if classes is None:
        return sample
    if pixels.dtype == torch.bool:
        kept = pixels.flatten(1).any(1).nonzero()[:, 0].tolist()
        pixels, place_of = pixels[kept], {old: new for new, old in enumerate(kept)}
    else:
        place_of = {segment: segment for segment in pixels.unique().tolist()}
    found: Any = {
        **sample,
        "segmentation_map": tv_tensors.Mask(pixels),
        "instance_id_to_semantic_id": {place_of[i]: label for i, label in classes.items() if i in place_of},
        "crowd_ids": [place_of[i] for i in sample["crowd_ids"] if i in place_of],
    }
    if "areas" in sample:
        found["areas"] = {place_of[i]: area for i, area in sample["areas"].items() if i in place_of}
    return found


def segments_of(sample: Sample, void_id: int | None = None) -> Segments:
    """The segments of a sample; `void_id` marks unlabeled pixels in a map (None: as in the readers)."""
    pixels = sample["segmentation_map"].as_subclass(Tensor)
    classes, name = sample["instance_id_to_semantic_id"], sample["name"]
    if classes is None:
        return Segments.from_class_map(pixels[0], void_value(pixels) if void_id is None else void_id, name)
    if pixels.dtype != torch.bool:
        pixels = pixels[0]
        classes = classes if void_id is None else {**classes, void_id: classes.get(void_id, VOID)}
    return Segments.from_ids(pixels, classes, sample["crowd_ids"], sample.get("areas"), name)


def void_value(class_map: Tensor) -> int:
    """Value of unlabeled pixels in a map of classes of any reader: 255 in a uint8 map, 65535 in a wider one."""
    return 255 if class_map.dtype == torch.uint8 else 65535

"""Samples from maps of ids, and the ids back from samples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors

from maskcls_hf.data import Sample, Segments
from maskcls_hf.models.segments import NO_SEGMENT, VOID


def sample_of(
    pixels: Tensor,
    classes: Mapping[int, int | None] | None = None,
    crowd_ids: Sequence[int] = (),
    name: str = "x",
    image: Tensor | None = None,
    void_id: int = 255,
) -> Sample:
    """Of a map of ids (H, W) or (1, H, W), or a stack of masks (M, H, W) bool; else its ids are classes."""
    pixels = pixels[0] if pixels.ndim == 3 and pixels.dtype != torch.bool else pixels
    if classes is None:
        segments = Segments.from_class_map(pixels, void_id, name)
    else:
        segments = Segments.from_ids(pixels, classes, crowd_ids, name=name)
    image = torch.zeros(3, *pixels.shape[-2:], dtype=torch.uint8) if image is None else image
    return Sample(image=tv_tensors.Image(image), segments=segments)


def id_map(sample: Sample, void: int = 255, none: int = 0) -> Tensor:
    """(1, H, W) int64, the id of each pixel's segment, `void` where unlabeled, `none` in no segment."""
    segments = sample["segments"]
    ids = torch.tensor([*segments.ids, none, void])
    return ids[segments.index_map.long()][None]


def class_of_id(sample: Sample) -> dict[int, int]:
    segments = sample["segments"]
    return dict(zip(segments.ids, segments.class_labels.tolist(), strict=True))


def crowd_ids(sample: Sample) -> list[int]:
    segments = sample["segments"]
    return [i for i, is_crowd in zip(segments.ids, segments.is_crowd.tolist(), strict=True) if is_crowd]


def others(sample: Sample) -> set[int]:
    """`VOID` and `NO_SEGMENT`, those of them that pixels are."""
    return {VOID, NO_SEGMENT} & set(sample["segments"].index_map.unique().tolist())


def same_segments(one: Sample, other: Sample) -> bool:
    first, second = one["segments"], other["segments"]
    return (
        torch.equal(first.pixels, second.pixels)
        and torch.equal(first.class_labels, second.class_labels)
        and torch.equal(first.is_crowd, second.is_crowd)
    )

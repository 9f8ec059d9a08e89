"""One annotated image, as every reader gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from torch import Tensor
from torchvision import tv_tensors

from ..models.segments import VOID, Segments, void_id_of

__all__ = ["VOID", "Sample", "Segments", "as_sample", "void_id_of", "without_absent"]


class Sample(TypedDict):
    """One annotated image.

    torchvision's transforms know no segments and let them pass: give them the image and
    `tv_tensors.Mask(segments.pixels)`, and `segments.with_pixels(mask)` are those of the result.

    Attributes:
        image: (3, H, W) uint8; of a 16-bit file float32 on the same scale of 0..255, so that nothing is lost.
        segments: of the same size, with classes 0..K-1 and the name of the image. A segment without a pixel is no
            target, but scores count it as not found. Training sees crowds as void, scores as COCO does.
    """

    image: tv_tensors.Image
    segments: Segments


def as_sample(image: Tensor, segments: Segments, name: str) -> Sample:
    """The sample of an image. Forms of masks that are made for it are not kept in a cache.

    Args:
        image: (3, H, W), uint8, or float32 on the scale of 0..255.
        segments: of the same size.
        name: that messages and scores give the image.
    """
    return Sample(image=tv_tensors.Image(image), segments=replace(segments, name=name))


def without_absent(sample: Sample) -> Sample:
    """The same without the segments that have no pixel, such as those outside of a crop: scores would miss them."""
    segments = sample["segments"]
    return Sample(image=sample["image"], segments=segments.select(segments.visible))

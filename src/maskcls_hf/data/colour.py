"""Random colours of training images; maps stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .resize_and_crop import uniform


class SSDColour(v2.Transform):
    """Brightness, contrast, saturation and hue as in the paper's training (detectron2's `ColorAugSSDTransform`).

    Each is changed with probability 1/2: brightness by adding up to +-32 of 255; contrast by a factor of 0.5 to 1.5
    on all channels, before or after the other two; saturation of HSV by a factor of 0.5 to 1.5; hue by up to a tenth
    of the circle (+-18 steps of OpenCV's 180).
    """

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {
            "brightness": uniform(-32, 32) if _coin() else None,
            "contrast": uniform(0.5, 1.5) if _coin() else None,
            "saturation": uniform(0.5, 1.5) if _coin() else None,
            "hue": uniform(-0.1, 0.1) if _coin() else None,
            "contrast_first": _coin(),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(ssd_colour(inpt.as_subclass(Tensor), **params), like=inpt)


def ssd_colour(
    image: Tensor,
    brightness: float | None,
    contrast: float | None,
    saturation: float | None,
    hue: float | None,
    contrast_first: bool,
) -> Tensor:
    """(3, H, W) uint8, or floating point in 0..1 -> the same; None leaves a property as it is."""
    if brightness is not None:
        bound = 1 if image.is_floating_point() else 255
        image = (image + brightness * bound / 255).clamp(0, bound).to(image.dtype)
    if contrast is not None and contrast_first:
        image = F.adjust_brightness(image, contrast)
    if saturation is not None:
        image = scale_saturation(image, saturation)
    if hue is not None:
        image = F.adjust_hue(image, hue)
    if contrast is not None and not contrast_first:
        image = F.adjust_brightness(image, contrast)
    return image


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Saturation of HSV times `factor`, at most 1; hue and value stay. torchvision's blends with luma instead."""
    value = image.amax(-3, keepdim=True).float()
    chroma = value - image.amin(-3, keepdim=True)
    factors = (value / chroma).nan_to_num(1).clamp(max=factor)  # value / chroma = 1 / saturation; 0 / 0 is black
    changed = value - factors * (value - image)
    return changed if image.is_floating_point() else changed.round().to(image.dtype)


def any_contrast() -> v2.Transform:
    """Inverted, grey, blurred and stretched contrast: other cameras, stains and microscopes."""
    return v2.Compose(
        [
            v2.RandomAutocontrast(p=0.2),
            v2.RandomInvert(p=0.15),
            v2.RandomGrayscale(p=0.1),
            v2.RandomApply([v2.GaussianBlur(kernel_size=5, sigma=(0.1, 1.5))], p=0.15),
        ]
    )


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)

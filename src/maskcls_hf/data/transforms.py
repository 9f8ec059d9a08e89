"""Training augmentation on tv_tensors. All resampling is torchvision's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class ScaleJitterCrop(v2.Transform):
    """A random square of the image, enlarged by a random factor to `size` x `size` pixels.

    Cropping before resizing keeps the cost independent of the size of the image. An image smaller than the
    wanted square is enlarged more, so that there is never any padding.

    Args:
        size: height and width of the result in pixels.
        scale: bounds of the factor, drawn uniformly in its logarithm; 2 shows objects twice as large.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        if size < 1 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Needs size >= 1 and 0 < scale[0] <= scale[1], got size={size}, scale={scale}.")
        self.size = size
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        height, width = v2.query_size(flat_inputs)
        low, high = (math.log(bound) for bound in self.scale)
        factor = math.exp(low + (high - low) * float(torch.rand(())))
        side = min(round(self.size / factor), height, width)
        side = max(side, 1)
        return {
            "top": int(torch.randint(height - side + 1, ())),
            "left": int(torch.randint(width - side + 1, ())),
            "height": side,
            "width": side,
        }

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(F.resized_crop, inpt, **params, size=[self.size, self.size], antialias=True)


class RandomRotate90(v2.Transform):
    """Turn by 0, 90, 180 or 270 degrees, without resampling, for images that have no up."""

    _transformed_types = (tv_tensors.Image, tv_tensors.Mask)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], dims=(-2, -1)), like=inpt)


def train_transform(
    crop_size: int,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    any_orientation: bool = False,
    colour_jitter: float = 0.4,
    any_contrast: bool = False,
) -> v2.Transform:
    """Augmentation of one image with its map: `image, segmentation_map = transform(image, segmentation_map)`.

    Args:
        crop_size: height and width of the training crop in pixels.
        scale: bounds of the random enlargement before the crop.
        any_orientation: also vertical flips and quarter turns.
        colour_jitter: largest change of brightness, contrast and saturation; an eighth of it for hue.
        any_contrast: also inverted, grey, blurred and stretched contrast, for models that shall work with
            other cameras, stains and microscopes.
    """
    steps: list[v2.Transform] = [ScaleJitterCrop(crop_size, scale), v2.RandomHorizontalFlip()]
    if any_orientation:
        steps.append(RandomRotate90())
    if colour_jitter > 0:
        strength = colour_jitter
        steps.append(v2.ColorJitter(strength, strength, strength, min(strength / 8, 0.5)))
    if any_contrast:
        steps += [
            v2.RandomAutocontrast(p=0.2),
            v2.RandomInvert(p=0.15),
            v2.RandomGrayscale(p=0.1),
            v2.RandomApply([v2.GaussianBlur(kernel_size=5, sigma=(0.1, 1.5))], p=0.15),
        ]
    return v2.Compose(steps)


class CentreCrop(v2.Transform):
    """The middle of the image, at most `size` x `size` pixels and never padded."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"output_size": [min(self.size, length) for length in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.center_crop, inpt, **params)

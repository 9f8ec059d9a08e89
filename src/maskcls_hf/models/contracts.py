"""What the parts of the network hand to each other.

Shape legend: B images, N queries (segments predicted for an image), K classes, M ground-truth segments of an
image, (H, W) network input, (h, w) = (H/4, W/4), C hidden size, C_E size of the mask embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class PixelFeatures:
    """Output of every pixel decoder (paper Section 3.2, pixel-level module).

    The per-pixel embeddings are made when they are first needed.
    """

    context: Tensor  # image features F that the transformer decoder attends to (B, C_F, H/32, W/32)
    pyramid: list[Tensor]  # decoder features, coarsest first, each (B, C_fpn, h_l, w_l)
    mask_projection: nn.Conv2d | None  # the finest features -> per-pixel embeddings; None: these are given
    region: "ValidRegion | None"
    per_pixel_embeddings: Tensor | None = None  # E_pixel (B, C_E, h, w), once made
    upsampling: int = 1  # factor by which mask logits are upsampled, their corners aligned
    valid_sizes: Tensor | None = None  # (B, 2) height and width of the images without padding, in pixels

    @classmethod
    def of(cls, features: Any, region: "ValidRegion | None") -> "PixelFeatures":
        """What a pixel decoder of somebody's own returned, with `context`, `pyramid` and `per_pixel_embeddings`."""
        return cls(features.context, features.pyramid, None, region, features.per_pixel_embeddings)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PixelFeatures":
        """For models whose parts are on several devices: accelerate moves what a part is called with."""
        if self.context.device == torch.empty(0, device=device).device:
            return self

        def move(features: Tensor) -> Tensor:
            return features.to(device, non_blocking=non_blocking)

        region = self.region and ValidRegion(move(self.region.sizes), self.region.padded_size, self.region.complete)
        pyramid = [move(features) for features in self.pyramid]
        return PixelFeatures(
            move(self.context), pyramid, self.mask_projection, region, move(self.project()), self.upsampling
        )

    def project(self) -> Tensor:
        """Make `per_pixel_embeddings`, if they are not there yet."""
        if self.per_pixel_embeddings is None:
            assert self.mask_projection is not None
            self.per_pixel_embeddings = self._inside(self.mask_projection)
        return self.per_pixel_embeddings

    def mask_logits(self, mask_embeddings: Tensor) -> Tensor:
        """Dot product of each mask embedding with each pixel's: (B, N, C_E) -> (B, N, h, w), upsampled."""
        embeddings = self.project()  # (B, C_E, h, w)
        logits = (mask_embeddings @ embeddings.flatten(2)).unflatten(2, embeddings.shape[2:])  # (B, N, h, w)
        if self.upsampling > 1:
            logits = F.interpolate(logits, scale_factor=self.upsampling, mode="bilinear", align_corners=True)
        return logits.contiguous()

    def _inside(self, projection: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the finest features; what is not image has no part in it, and repeats the border of the image."""
        finest, region = self.pyramid[-1], self.region
        if region is None:
            return projection(finest)
        return region.extend_edges(projection(finest * region.mask_at(*finest.shape[-2:])[:, None]))


class SegmentLogits(NamedTuple):
    """N probability-mask pairs of each image, as logits, from one decoder layer."""

    class_logits: Tensor  # (B, N, K + 1), "no object" last
    mask_logits: Tensor  # (B, N, h, w)
    boxes: Tensor | None = None  # (B, N, 4) in 0..1, with a box head

    def map(self, function: Callable[[Tensor], Tensor]) -> "SegmentLogits":
        """`function` of each tensor that is there."""
        boxes = None if self.boxes is None else function(self.boxes)
        return SegmentLogits(function(self.class_logits), function(self.mask_logits), boxes)

    def as_output(self) -> dict[str, Tensor]:
        """By the names of transformers' outputs."""
        names = ("class_queries_logits", "masks_queries_logits", "pred_boxes")
        return {name: tensor for name, tensor in zip(names, self, strict=True) if tensor is not None}


class PixelLogits(NamedTuple):
    """What auxiliary losses look at, once an image; None where no loss asks for it."""

    embeddings: Tensor | None = None  # E_pixel (B, C_E, h, w)
    semantic_logits: Tensor | None = None  # (B, K, h, w)


def layer_suffix(index: int, layers: int) -> str:
    """Ending of the names of a decoder layer's loss terms: none of the deepest, "_0", "_1", ... of the others."""
    return "" if index == layers - 1 else f"_{index}"


class ValidRegion:
    """The part of a padded batch that is image; padding lies at the bottom and on the right.

    Args:
        sizes (`torch.Tensor` of shape `(B, 2)`): height and width of each image in pixels of the network input.
        padded_size (`tuple[int, int]`): (H, W) of the network input.
        complete (`bool`): nothing is known to be padded.
    """

    def __init__(self, sizes: Tensor, padded_size: tuple[int, int], complete: bool):
        self.sizes = sizes
        self.padded_size = padded_size
        self.complete = complete

    @classmethod
    def of_batch(cls, pixel_values: Tensor, pixel_mask: Tensor | None) -> "ValidRegion":
        """pixel_values (B, 3, H, W), pixel_mask (B, H, W), non-zero where there is image (None: everywhere).

        Raises:
            `ValueError`: shapes that do not fit; on the CPU also an image without a pixel, or padding elsewhere than at
                the bottom and on the right.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (B, C, H, W), got the shape {tuple(pixel_values.shape)}.")
        images, _, height, width = pixel_values.shape
        if pixel_mask is None:
            lengths = [torch.full((images,), length, device=pixel_values.device) for length in (height, width)]
            return cls(torch.stack(lengths, dim=1), (height, width), complete=True)
        if pixel_mask.shape != (images, height, width):
            raise ValueError(
                f"pixel_mask has the shape {tuple(pixel_mask.shape)}, but for these pixel_values it must be "
                f"{(images, height, width)}: one map an image, 1 for image and 0 for padding."
            )
        inside = pixel_mask != 0
        sizes = torch.stack([inside.any(2).sum(1), inside.any(1).sum(1)], dim=1)  # (B, 2)
        region = cls(sizes, (height, width), complete=False)
        # Looking is free on the CPU; elsewhere it would make the host wait.
        if inside.device.type == "cpu" and not torch.compiler.is_compiling():
            region.check(inside)
            region.complete = bool(inside.all())
        return region

    def check(self, inside: Tensor) -> None:
        """Raise `ValueError` where a mask (B, H, W) is not that of an image in the upper left corner."""
        empty = (self.sizes == 0).any(1)  # (B,)
        wrong = (inside != self.mask_at(*self.padded_size)).flatten(1).any(1)  # (B,)
        if empty.any():
            raise ValueError(f"pixel_mask: image {int(empty.nonzero()[0])} of the batch has no pixel. Leave it out.")
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(f"pixel_mask: padding of image {index} is not at the bottom and on the right.")

    def trimmed(self, multiple: int) -> "ValidRegion":
        """The batch without what is padding of every image, in multiples of `multiple` pixels.

        On the CPU only, as it looks; and only where the padded size is such a multiple, so that maps of all strides are
        trimmed in proportion.
        """
        is_known = self.sizes.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.complete or not is_known or any(length % multiple for length in self.padded_size):
            return self
        height, width = (-(-length // multiple) * multiple for length in self.sizes.amax(0).tolist())
        if (height, width) == self.padded_size:
            return self
        is_complete = bool((self.sizes == torch.tensor([height, width])).all())
        return ValidRegion(self.sizes, (height, width), is_complete)

    def sizes_at(self, height: int, width: int) -> Tensor:
        """Sizes of the images on a grid of `height` x `width` cells (B, 2); a cell partly inside counts."""
        scaled = [
            (self.sizes[:, axis] * cells + pixels - 1) // pixels
            for axis, (cells, pixels) in enumerate(zip((height, width), self.padded_size, strict=True))
        ]
        return torch.stack(scaled, dim=1)

    def mask_at(self, height: int, width: int) -> Tensor:
        """True inside the images, on a grid of `height` x `width` cells (B, height, width)."""
        sizes = self.sizes_at(height, width)
        rows = torch.arange(height, device=sizes.device) < sizes[:, :1]  # (B, height)
        columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]  # (B, width)
        return rows[:, :, None] & columns[:, None, :]

    def extend_edges(self, features: Tensor) -> Tensor:
        """Repeat the last row and column of each image over its padding: (B, C, h, w) -> (B, C, h, w).

        Bilinear upsampling then sees at the border of the image what it would see without padding.
        """
        batch, channels, height, width = features.shape
        last = (self.sizes_at(height, width) - 1).clamp(min=0)  # (B, 2)
        rows = torch.minimum(torch.arange(height, device=last.device), last[:, :1])  # (B, h)
        columns = torch.minimum(torch.arange(width, device=last.device), last[:, 1:])  # (B, w)
        features = features.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
        return features.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))

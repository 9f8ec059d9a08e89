"""Keeps padding out of a backbone, so that an image gives the same features whatever it is padded to."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contracts import ValidRegion

# By class name, so that a backbone is imported (and timm installed) only where it is used.
MERGINGS = ("SwinPatchMerging", "Swinv2PatchMerging")
WINDOW_LAYERS = ("SwinLayer", "Swinv2Layer")
RESPONSE_NORMS = ("ConvNextV2GRN", "GlobalResponseNorm")
SQUEEZES = ("SqueezeExcite", "SEModule")


class BorderGuard:
    """Forward hooks on every layer of a backbone that mixes cells.

    What enters a convolution is zero outside the image (for max pooling: the least value), as beyond the border of an
    image that is not padded. The windows of Swin and SwinV2 do not attend to cells outside, those that fill up a window
    included (unless `attend_to_filling`, as transformers' Swin does). Global response norms (ConvNeXtV2) and
    squeeze-and-excitation (MobileNetV3, EfficientNet) sum over the image only. Attention in other backbones is left
    alone.

    `region` stays until the next forward pass: gradient checkpointing runs layers again in the backward pass.
    """

    def __init__(self, backbone: nn.Module, attend_to_filling: bool = False):
        self.region: ValidRegion | None = None
        self.attend_to_filling = attend_to_filling
        for module in backbone.modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and as_pair(module.kernel_size) > as_pair(module.stride):
                module.register_forward_pre_hook(self.guard_convolution)
            elif type(module).__name__ in MERGINGS:
                module.register_forward_pre_hook(self.guard_merging)
            elif type(module).__name__ in WINDOW_LAYERS:
                module.register_forward_pre_hook(WindowGuard(self, module).note_size)
            elif type(module).__name__ in RESPONSE_NORMS:
                module.register_forward_pre_hook(self.guard_response_norm)
            elif type(module).__name__ in SQUEEZES:
                module.register_forward_pre_hook(self.guard_squeeze)
                module.register_forward_hook(self.undo_scale)

    def outside(self, height: int, width: int) -> Tensor | None:
        """True outside the images on a grid of cells (B, height, width); None: nothing is."""
        if self.region is None or self.region.complete:
            return None
        return ~self.region.mask_at(height, width)

    def guard_convolution(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        features, *rest = inputs  # (B, C, h, w)
        outside = self.outside(*features.shape[-2:])
        if outside is None:
            return None
        nothing: Tensor | float = 0.0
        if isinstance(module, nn.MaxPool2d):
            nothing = features.amin((2, 3), keepdim=True)  # never wins where a window has a cell of the image
        return torch.where(outside[:, None], nothing, features), *rest

    def guard_merging(self, module: nn.Module, inputs: tuple) -> tuple | None:
        features, (height, width) = inputs  # (B, h * w, C)
        outside = self.outside(height, width)
        if outside is None:
            return None
        return features.masked_fill(outside.flatten(1)[:, :, None], 0.0), (height, width)

    def guard_response_norm(self, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        (features,) = inputs  # (B, h, w, C), or (B, C, h, w) of timm
        rows, columns = getattr(module, "spatial_dim", (1, 2))
        outside = self.outside(features.shape[rows], features.shape[columns])
        if outside is None:
            return None
        return (features.masked_fill(outside[..., None] if rows == 1 else outside[:, None], 0.0),)

    def guard_squeeze(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The module takes the mean over all cells and multiplies its input by what follows from it. The image is
        scaled so that this mean is its own."""
        (features,) = inputs  # (B, C, h, w)
        outside = self.outside(*features.shape[-2:])
        if outside is None:
            return None
        return (features.masked_fill(outside[:, None], 0.0) / inside_part(outside, features.dtype),)

    def undo_scale(self, module: nn.Module, inputs: tuple[Tensor, ...], features: Tensor) -> Tensor | None:
        outside = self.outside(*features.shape[-2:])
        return None if outside is None else features * inside_part(outside, features.dtype)


class WindowGuard:
    """Masks, in the attention of one layer of Swin or SwinV2, the keys that are not image."""

    def __init__(self, border: BorderGuard, layer: Any):
        self.border = border
        self.window, self.shift = layer.window_size, layer.shift_size
        self.compares_directions = type(layer).__name__ == "Swinv2Layer"
        self.size = (0, 0)
        layer.attention.register_forward_pre_hook(self.mask_keys)

    def note_size(self, layer: nn.Module, inputs: tuple) -> None:
        self.size = inputs[1]  # (h, w) of the layer's map, before it is filled up to whole windows

    def mask_keys(self, attention: nn.Module, inputs: tuple) -> tuple | None:
        windows, shift_mask = inputs  # (B * number of windows, L, C), (number of windows, L, L), L = window ** 2
        region, (height, width) = self.border.region, self.size
        filling = (0, -width % self.window, 0, -height % self.window)
        attend_to_filling = self.border.attend_to_filling
        if region is None or (region.complete and (attend_to_filling or not any(filling))):
            return None
        inside = F.pad(region.mask_at(height, width), filling, value=attend_to_filling)  # (B, h, w) in whole windows
        inside = inside.roll((-self.shift, -self.shift), (1, 2))
        inside = inside.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window)).transpose(2, 3)
        keys = inside.flatten(3).flatten(0, 2)  # (B * number of windows, L)
        if self.compares_directions:  # zeros, which fill up windows, have none: NaN in float16
            windows = windows.masked_fill(~keys[:, :, None], 1.0)
        # Finite, so that windows without any image stay finite too.
        mask = torch.zeros_like(keys, dtype=windows.dtype).masked_fill(~keys, -1e4)[:, None]
        if shift_mask is None:
            return windows, mask.expand(-1, keys.shape[1], -1)
        return windows, mask + shift_mask.repeat(keys.shape[0] // shift_mask.shape[0], 1, 1)


def inside_part(outside: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, h, w) -> the part of the cells that is image (B, 1, 1, 1)."""
    return (~outside).float().mean((1, 2))[:, None, None, None].to(dtype)


def as_pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size, size)

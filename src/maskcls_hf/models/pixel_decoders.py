"""Pixel decoders: backbone feature maps -> per-pixel embeddings (paper Section 3.2, pixel-level module).

A pixel decoder is `decoder(feature_maps, region) -> PixelFeatures`. `feature_maps` come from the backbone, finest
first (strides 4, 8, 16, 32). A new one is a class, made of the configuration and the channels of these maps, with
`context_channels`, and a line: `register_pixel_decoder(name, cls)`.

Shape legend: B images, (H, W) network input, (h, w) = (H/4, W/4), N queries, C_E size of the mask embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_maskcls import PIXEL_DECODERS
from .deformable_attention import DeformableLayer, reference_points
from .layers import ConvNorm, TransformerLayer, ValidRegion, all_rows, sine_positions


@dataclass
class PixelFeatures:
    """Output of every pixel decoder (paper Section 3.2, pixel-level module).

    The per-pixel embeddings are made when they are first needed.
    """

    context: Tensor  # image features F that the transformer decoder attends to (B, C_F, H/32, W/32)
    pyramid: list[Tensor]  # decoder features, coarsest first, each (B, C_fpn, h_l, w_l)
    mask_projection: nn.Conv2d | None  # the finest features -> per-pixel embeddings; None: these are given
    region: ValidRegion | None
    per_pixel_embeddings: Tensor | None = None  # E_pixel (B, C_E, h, w), once made
    upsampling: int = 1  # factor by which mask logits are upsampled, their corners aligned
    valid_sizes: Tensor | None = None  # (B, 2) height and width of the images without padding, in pixels
    _resized: list[tuple[tuple[int, int], Tensor]] = field(default_factory=list, repr=False)  # sizes can be symbols

    @classmethod
    def of(cls, features: Any, region: ValidRegion | None) -> "PixelFeatures":
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

    def mask_logits(self, mask_embeddings: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Dot product of each mask embedding with each pixel's: (B, N, C_E) -> (B, N, h, w), upsampled; or (B, N,
        *size), where a `size` is given."""
        embeddings = self.project() if size is None else self.resized(size)  # (B, C_E, h, w)
        mask_embeddings = mask_embeddings.to(embeddings.dtype)
        logits = (mask_embeddings @ embeddings.flatten(2)).unflatten(2, embeddings.shape[2:])  # (B, N, h, w)
        if self.upsampling > 1 and size is None:
            logits = F.interpolate(logits, scale_factor=self.upsampling, mode="bilinear", align_corners=True)
        return logits.contiguous()

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Per-pixel embeddings (B, C_E, *size); resizing commutes with the product that makes masks of them."""
        for known, embeddings in self._resized:
            if known == size:
                return embeddings
        embeddings = F.interpolate(self.project(), size=size, mode="bilinear", align_corners=False)
        self._resized.append((size, embeddings))
        return embeddings

    def _inside(self, projection: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the finest features; what is not image has no part in it, and repeats the border of the image."""
        finest, region = self.pyramid[-1], self.region
        if region is None:
            return projection(finest)
        return region.extend_edges(projection(finest * region.mask_at(*finest.shape[-2:])[:, None]))


class FPNPixelDecoder(nn.Module):
    """The light-weight feature pyramid of the paper (Section 4.1): nearest upsampling, sum, 3x3 convolution."""

    def __init__(self, config, in_channels: list[int]):
        super().__init__()
        size = config.fpn_feature_size
        self.context_channels = in_channels[-1]
        self.laterals = nn.ModuleList(ConvNorm(c, size, kernel_size=1, relu=False) for c in in_channels[:-1])
        top_channels = self.build_top(config, in_channels[-1])
        self.outputs = nn.ModuleList(
            ConvNorm(c, size, kernel_size=3, relu=True) for c in [size] * (len(in_channels) - 1) + [top_channels]
        )
        self.mask_projection = mask_projection(config, size)

    def build_top(self, config, in_channels: int) -> int:
        """Make what runs on the coarsest feature map; returns its number of channels."""
        return in_channels

    def top(self, features: Tensor, region: ValidRegion | None) -> Tensor:
        """Coarsest feature map (B, C_F, H/32, W/32) -> context that the transformer decoder attends to."""
        return features

    def forward(self, feature_maps: list[Tensor], region: ValidRegion | None = None) -> PixelFeatures:
        context = self.top(feature_maps[-1], region)
        features = self.outputs[-1](context, region)
        pyramid = [features]
        for level in reversed(range(len(self.laterals))):
            lateral = self.laterals[level](feature_maps[level], region)
            lateral += F.interpolate(features, size=lateral.shape[-2:], mode="nearest")
            features = self.outputs[level](lateral, region)
            pyramid.append(features)
        return PixelFeatures(context, pyramid, self.mask_projection, region)


class FPNEncoderPixelDecoder(FPNPixelDecoder):
    """FPN over transformer encoder layers on the coarsest map: COCO panoptic R50 and R101 (paper Appendix A)."""

    def build_top(self, config, in_channels: int) -> int:
        size = config.fpn_feature_size
        self.context_channels = size
        self.input_projection = nn.Conv2d(in_channels, size, kernel_size=1)
        self.encoder = TransformerEncoder(config)
        return size

    def top(self, features: Tensor, region: ValidRegion | None) -> Tensor:
        return self.encoder(self.input_projection(features), region)


class TransformerEncoder(nn.Module):
    """`encoder_layers` post-norm transformer layers over a feature map (B, C, h, w)."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(config, config.fpn_feature_size, config.encoder_ffn_dim, cross_attention=False)
            for _ in range(config.encoder_layers)
        )

    def forward(self, features: Tensor, region: ValidRegion | None) -> Tensor:
        inside = None if region is None else region.mask_at(*features.shape[-2:])  # (B, h, w)
        positions = sine_positions(features, inside)
        key_mask = None if inside is None else inside.flatten(1)
        tokens = features.flatten(2).transpose(1, 2)  # (B, h * w, C)
        for layer in self.layers:
            tokens, _ = layer(tokens, positions, key_mask)
        return tokens.transpose(1, 2).unflatten(2, features.shape[-2:])


class DeformablePixelDecoder(nn.Module):
    """Multi-scale deformable attention over the three coarsest maps, then steps of a feature pyramid (Mask2Former,
    Section 3.2.1 and 4.1).

    It computes in float32 under autocast, as the code of its paper.

    Args:
        levels, points: maps that attend to each other, and places that a query looks at on each.
    """

    def __init__(self, config, in_channels: list[int], levels: int = 3, points: int = 4):
        super().__init__()
        size = config.fpn_feature_size
        self.context_channels = size
        self.num_levels = min(levels, len(in_channels))
        self.input_projections = nn.ModuleList(  # coarsest first
            ConvNorm(c, size, kernel_size=1, relu=False, xavier=True) for c in reversed(in_channels[-self.num_levels :])
        )
        self.level_embedding = nn.Embedding(self.num_levels, size)
        self.layers = nn.ModuleList(
            DeformableLayer(config, size, self.num_levels, points) for _ in range(config.encoder_layers)
        )
        finer = in_channels[: -self.num_levels]
        self.laterals = nn.ModuleList(ConvNorm(c, size, kernel_size=1, relu=False) for c in finer)
        self.outputs = nn.ModuleList(ConvNorm(size, size, kernel_size=3, relu=True) for _ in finer)
        self.mask_projection = mask_projection(config, size)

    def forward(self, feature_maps: list[Tensor], region: ValidRegion | None = None) -> PixelFeatures:
        with torch.autocast(feature_maps[0].device.type, enabled=False):
            dtype = self.mask_projection.weight.dtype
            feature_maps = [features.to(dtype) for features in feature_maps]
            pyramid = self.encode(feature_maps[: -self.num_levels - 1 : -1], region)
            for level in reversed(range(len(self.laterals))):
                lateral = self.laterals[level](feature_maps[level], region)
                coarser = pyramid[-1] if region is None else region.extend_edges(pyramid[-1])
                lateral += F.interpolate(coarser, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
                pyramid.append(self.outputs[level](lateral, region))
        return PixelFeatures(pyramid[0], pyramid, self.mask_projection, region)

    def encode(self, feature_maps: list[Tensor], region: ValidRegion | None) -> list[Tensor]:
        """Maps that attend to each other, coarsest first: (B, C_F, h, w) -> (B, C, h, w) each."""
        maps = [
            project(features, region) for project, features in zip(self.input_projections, feature_maps, strict=True)
        ]
        sizes = [(features.shape[2], features.shape[3]) for features in maps]
        levels = all_rows(self.level_embedding, maps[0].device)  # (R, C)
        masks = [None if region is None else region.mask_at(*size) for size in sizes]
        positions = [
            sine_positions(features, mask) + level for features, mask, level in zip(maps, masks, levels, strict=True)
        ]
        inside = None if region is None else torch.cat([mask.flatten(1) for mask in masks if mask is not None], 1)
        valid = None if region is None else [region.sizes_at(*size) for size in sizes]
        like = maps[0].new_empty(0, dtype=torch.promote_types(maps[0].dtype, torch.float32))
        reference = reference_points(sizes, valid, like)
        placed = torch.cat(positions, 1)  # (B or 1, S, C)
        tokens = torch.cat([features.flatten(2) for features in maps], 2).transpose(1, 2)  # (B, S, C)
        for layer in self.layers:
            tokens = layer(tokens, placed, reference, sizes, inside)
        parts = tokens.split([height * width for height, width in sizes], 1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


class PerPixelDecoder(nn.Module):
    """What is left to do where the backbone is a whole per-pixel network (per_pixel_networks.py): the projection."""

    def __init__(self, config, in_channels: list[int]):
        super().__init__()
        self.context_channels = in_channels[-1]
        self.upsampling = config.mask_upsampling
        self.mask_projection = mask_projection(config, in_channels[0])

    def forward(self, feature_maps: list[Tensor], region: ValidRegion | None = None) -> PixelFeatures:
        finest, context = feature_maps
        return PixelFeatures(context, [context, finest], self.mask_projection, region, upsampling=self.upsampling)


def mask_projection(config, in_channels: int) -> nn.Conv2d:
    """Finest features -> per-pixel embeddings."""
    kernel_size = config.mask_kernel_size
    return nn.Conv2d(in_channels, config.mask_feature_size, kernel_size, padding=kernel_size // 2)


PIXEL_DECODERS.register("fpn", FPNPixelDecoder)
PIXEL_DECODERS.register("fpn_encoder", FPNEncoderPixelDecoder)
PIXEL_DECODERS.register("deformable", DeformablePixelDecoder)
PIXEL_DECODERS.register("per_pixel", PerPixelDecoder)

"""Transformer decoders: queries look at the image and become per-segment embeddings (paper Section 3.2).

A decoder is `decoder(features, predict, output_attentions) -> DecoderOutput`. `predict(segment_embeddings, features)`
is the segmentation module, for a decoder that looks at masks between its layers (masked attention); the paper's does
not. A new one is a class, made of the configuration and the channels of the context, and a line:
`register_transformer_decoder(name, cls)`.

Shape legend: B images, N queries (segments predicted for an image), K classes, C hidden size, (H, W) network input,
(h, w) = (H/4, W/4).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_maskcls import TRANSFORMER_DECODERS
from .layers import TransformerLayer, all_rows, sine_positions
from .pixel_decoders import PixelFeatures


class MaskProduct(NamedTuple):
    """The factors of mask logits: a loss needs few of the masks, or few points of them."""

    mask_embeddings: Tensor  # (B, N, C_E)
    features: PixelFeatures

    def logits(self) -> Tensor:
        """(B, N, h, w)."""
        return self.features.mask_logits(self.mask_embeddings)


class SegmentLogits(NamedTuple):
    """N probability-mask pairs of each image, as logits, from one decoder layer."""

    class_logits: Tensor  # (B, N, K + 1), "no object" last
    mask_logits: Any  # (B, N, h, w); in training their factors, a `MaskProduct`
    boxes: Tensor | None = None  # (B, N, 4) in 0..1, with a box head

    def map(self, function: Callable[[Tensor], Tensor]) -> "SegmentLogits":
        """`function` of each tensor that is there."""
        boxes = None if self.boxes is None else function(self.boxes)
        return SegmentLogits(function(self.class_logits), function(self.mask_logits), boxes)

    def as_output(self) -> dict[str, Tensor]:
        """By the names of transformers' outputs."""
        masks = self.mask_logits.logits() if isinstance(self.mask_logits, MaskProduct) else self.mask_logits
        names = ("class_queries_logits", "masks_queries_logits", "pred_boxes")
        found = zip(names, (self.class_logits, masks, self.boxes), strict=True)
        return {name: tensor for name, tensor in found if tensor is not None}


class PixelLogits(NamedTuple):
    """What auxiliary losses look at, once an image; None where no loss asks for it."""

    embeddings: Tensor | None = None  # E_pixel (B, C_E, h, w)
    semantic_logits: Tensor | None = None  # (B, K, h, w)


def layer_suffix(index: int, layers: int) -> str:
    """Ending of the names of a decoder layer's loss terms: none of the deepest, "_0", "_1", ... of the others."""
    return "" if index == layers - 1 else f"_{index}"


class DecoderOutput(NamedTuple):
    """One entry a supervised layer, deepest last; a decoder of somebody's own may return anything with these fields."""

    segment_embeddings: list[Tensor]  # Q, each (B, N, C)
    attentions: list[Tensor]  # of self-attention (B, heads, N, N), where asked for
    cross_attentions: list[Tensor]  # (B, heads, N, H/32 * W/32), where asked for
    features: list[PixelFeatures] = []  # of which each layer's masks are made; empty: the same for all
    predicts_input: bool = False  # the first entry is of what goes into the first layer


class StandardTransformerDecoder(nn.Module):
    """The paper's decoder: DETR's, with learned queries as positions and zeros as input (Appendix A).

    Every layer's output goes through the final norm, not only the last one's: the inner layers are supervised too.
    """

    def __init__(self, config, in_channels: int):
        super().__init__()
        size = config.hidden_size
        self.input_projection = nn.Conv2d(in_channels, size, 1) if in_channels != size else nn.Identity()
        self.queries_embedder = nn.Embedding(config.num_queries, size)
        self.layers = nn.ModuleList(
            TransformerLayer(config, size, config.decoder_ffn_dim, cross_attention=True)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(size)

    def forward(
        self,
        features: PixelFeatures,
        predict: Callable[[Tensor, PixelFeatures], SegmentLogits] | None = None,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        context_map = self.input_projection(features.context)  # (B, C, H/32, W/32)
        region = features.region
        inside = None if region is None else region.mask_at(*context_map.shape[-2:])
        context_positions = sine_positions(context_map, inside)
        key_mask = None if inside is None else inside.flatten(1)
        context = context_map.flatten(2).transpose(1, 2)  # (B, H/32 * W/32, C)
        placed_context = context + context_positions

        queries = all_rows(self.queries_embedder, context.device).expand(context.shape[0], -1, -1)  # (B, N, C)
        segments = torch.zeros_like(queries, dtype=context.dtype)
        output = DecoderOutput([], [], [])
        for layer in self.layers:
            segments, attentions = layer(segments, queries, key_mask, context, placed_context, output_attentions)
            output.segment_embeddings.append(segments)
            if output_attentions:
                output.attentions.append(attentions[0])
                output.cross_attentions.append(attentions[1])
        normed = self.norm(torch.stack(output.segment_embeddings)).unbind()  # (B, N, C) each
        return output._replace(segment_embeddings=[*normed])


class MaskedAttentionTransformerDecoder(nn.Module):
    """Mask2Former's decoder: each layer looks at one scale of the pyramid in turn, and there at the foreground of the
    mask that the query has predicted last (Section 3.2, Eq. 2); where that is empty, at the whole image.

    Predictions are made before the first layer too: the segment embeddings are one more than the layers.
    """

    def __init__(self, config, in_channels: int, levels: int = 3):
        super().__init__()
        size, in_channels = config.hidden_size, config.fpn_feature_size
        self.input_projections = nn.ModuleList(
            nn.Conv2d(in_channels, size, 1) if in_channels != size else nn.Identity() for _ in range(levels)
        )
        self.level_embedding = nn.Embedding(levels, size)
        self.queries_embedder = nn.Embedding(config.num_queries, size)  # positions
        self.queries_features = nn.Embedding(config.num_queries, size)
        self.layers = nn.ModuleList(
            TransformerLayer(config, size, config.decoder_ffn_dim, cross_attention=True, cross_first=True)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(size)

    def forward(
        self,
        features: PixelFeatures,
        predict: Callable[..., SegmentLogits] | None = None,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        if predict is None:
            raise ValueError(
                "Masked attention looks at predicted masks: call MaskClsForUniversalSegmentation, or give its "
                "segmentation_module as `predict`."
            )
        if len(features.pyramid) < len(self.input_projections):
            raise ValueError(
                f"transformer_decoder='masked_attention' looks at {len(self.input_projections)} scales, but there are "
                f"{len(features.pyramid)}: give the backbone more out_features, or transformer_decoder_options="
                f"{{'levels': {len(features.pyramid)}}}."
            )
        features.project()  # with gradients, before the masks of the attention ask for them
        levels = [self.level(number, features) for number in range(len(self.input_projections))]
        device, batch = features.context.device, features.context.shape[0]
        positions = all_rows(self.queries_embedder, device).expand(batch, -1, -1)  # (B, N, C)
        segments = all_rows(self.queries_features, device).expand(batch, -1, -1)
        output = DecoderOutput([self.norm(segments)], [], [], predicts_input=True)
        for number, layer in enumerate(self.layers):
            size, context, placed_context, inside = levels[number % len(levels)]
            with torch.no_grad():
                masks = predict(output.segment_embeddings[-1], features, size).mask_logits
                seen = foreground(masks.flatten(2), inside)
            segments, attentions = layer(segments, positions, seen, context, placed_context, output_attentions)
            output.segment_embeddings.append(self.norm(segments))
            if output_attentions:
                output.attentions.append(attentions[0])
                output.cross_attentions.append(attentions[1])
        return output

    def level(self, number: int, features: PixelFeatures) -> tuple[tuple[int, int], Tensor, Tensor, Tensor | None]:
        """Size (h, w) of a scale, its features without and with positions (B, h * w, C), and where they are image
        (B, 1, h * w)."""
        maps = self.input_projections[number](features.pyramid[number])  # (B, C, h, w)
        height, width = maps.shape[2:]
        inside = None if features.region is None else features.region.mask_at(height, width)
        level = all_rows(self.level_embedding, maps.device)[number]
        context = maps.flatten(2).transpose(1, 2) + level
        mask = None if inside is None else inside.flatten(1)[:, None]
        return (height, width), context, context + sine_positions(maps, inside), mask


def foreground(mask_logits: Tensor, inside: Tensor | None) -> Tensor:
    """Where queries look (B, N, m) bool, of their masks (B, N, m) and of what is image (B, 1, m)."""
    seen = mask_logits >= 0
    if inside is None:
        return seen | ~seen.any(-1, keepdim=True)
    seen &= inside
    return seen | (~seen.any(-1, keepdim=True) & inside)


TRANSFORMER_DECODERS.register("standard", StandardTransformerDecoder)
TRANSFORMER_DECODERS.register("masked_attention", MaskedAttentionTransformerDecoder)

"""EoMT: a plain ViT whose last blocks see the queries as tokens is the whole network (Kerssies et al., Your ViT is
Secretly an Image Segmentation Model, CVPR 2025).

Shape legend: B images, N queries, C channels of the ViT, (h, w) its grid of patches, T = N + prefix tokens + h * w.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone

from .backbones import PixelNorm, patch_size_of, upsample2x
from .layers import all_rows
from .pixel_decoders import PixelFeatures
from .transformer_decoders import DecoderOutput, SegmentLogits


class Access(NamedTuple):
    """Where a family of ViTs has its parts; its `embeddings` make tokens of an image, class token first."""

    layers: str
    norm: str
    run: Callable[..., Tensor]  # (block, tokens, mask, what `rotary` gives) -> tokens
    rotary: str | None = None


def run_dinov2(block: Any, tokens: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
    """By the modules of a block: until transformers 5.2x its own forward took no mask."""
    attention = block.attention
    if hasattr(attention, "q_proj"):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    else:
        inner = attention.attention
        projections = (inner.query, inner.key, inner.value, attention.output.dense)
    inner = getattr(attention, "attention", attention)
    heads = getattr(inner, "num_attention_heads", None) or inner.num_heads
    normed = block.norm1(tokens)
    queries, keys, values = (project(normed).unflatten(2, (heads, -1)).transpose(1, 2) for project in projections[:3])
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)  # (B, heads, T, C / heads)
    tokens = tokens + block.drop_path(block.layer_scale1(projections[3](attended.transpose(1, 2).flatten(2))))
    return tokens + block.drop_path(block.layer_scale2(block.mlp(block.norm2(tokens))))


def run_dinov3(block: Any, tokens: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
    """It turns the last tokens only, those of patches."""
    return block(tokens, attention_mask=mask, position_embeddings=rotary)


ACCESS = {
    "dinov2": Access("encoder.layer", "layernorm", run_dinov2),
    "dinov2_with_registers": Access("encoder.layer", "layernorm", run_dinov2),
    "dinov3_vit": Access("model.layer", "norm", run_dinov3, "rope_embeddings"),
}


class UpscaleBlock(nn.Sequential):
    """Doubles a map: (B, C, h, w) -> (B, C, 2 h, 2 w)."""

    def __init__(self, channels: int):
        super().__init__(
            upsample2x(channels, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
            PixelNorm(channels, eps=1e-6),
        )
        convolutions: list[Any] = [self[0], self[2]]
        for convolution in convolutions:
            convolution.init_as_torch = True  # as in EoMT's code


class EncoderOnly(nn.Module):
    """A plain ViT; its last `query_blocks` blocks see the queries, and masks are predicted before each of them and
    after the last.

    In training a query sees the patches of the mask that it has predicted last, with a probability a block
    (`mask_probabilities`) that is annealed to 0; so inference needs no masks.

    Args:
        config: `backbone_config` of a family in `ACCESS`, `num_queries`, `query_blocks`, `upscale_blocks`.

    Raises:
        ValueError: another family of ViTs, or more blocks with queries than there are.
    """

    def __init__(self, config):
        super().__init__()
        vit_config = config.backbone_config
        access = ACCESS.get(vit_config.model_type)
        if access is None:
            raise ValueError(
                f"architecture='encoder_only' takes a plain ViT, model_type {' or '.join(ACCESS)}, but backbone_config "
                f"has {vit_config.model_type!r}."
            )
        self.vit: Any = AutoBackbone.from_config(vit_config, trust_remote_code=False)
        self.vit.embeddings.register_parameter("mask_token", None)  # of its pretraining
        self.access = access
        if not 0 < config.query_blocks <= len(self.layers):
            raise ValueError(f"query_blocks={config.query_blocks} of {len(self.layers)} blocks of the ViT.")
        self.config = config
        size = vit_config.hidden_size
        self.patch_size = patch_size_of(self.vit)
        self.queries_embedder = nn.Embedding(config.num_queries, size)
        self.upscale = nn.ModuleList(UpscaleBlock(size) for _ in range(config.upscale_blocks))

    @property
    def layers(self) -> Any:
        """Blocks of the ViT."""
        return self.vit.get_submodule(self.access.layers)

    def forward(self, pixel_values: Tensor, predict: Callable[..., SegmentLogits], every_block: bool) -> DecoderOutput:
        """Segment embeddings (B, N, C) and pixel features of each supervised block, deepest last.

        Args:
            every_block: of all blocks with queries; else only what masks and the result need.
        """
        height, width = pixel_values.shape[-2:]
        rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(
                f"Images of {height} x {width} pixels are no whole patches of {rows} x {columns}: pad them to a "
                f"multiple (size_divisor={math.lcm(rows, columns)} of the image processor)."
            )
        grid = (height // rows, width // columns)
        tokens = self.vit.embeddings(pixel_values)  # (B, prefix + h w, C)
        rotary = None if self.access.rotary is None else self.vit.get_submodule(self.access.rotary)(pixel_values)
        first = len(self.layers) - self.config.query_blocks
        output = DecoderOutput([], [], [], [], predicts_input=True)
        for number, block in enumerate(self.layers):
            mask = None
            if number == first:
                queries = all_rows(self.queries_embedder, tokens.device).expand(len(tokens), -1, -1)
                tokens = torch.cat([queries.to(tokens.dtype), tokens], 1)  # (B, T, C)
            if number >= first:
                probability = self.config.mask_probabilities[number - first]
                if not (self.training or self.config.masks_in_evaluation):
                    probability = 0.0
                if every_block or probability > 0:
                    self.add_prediction(output, tokens, grid)
                if probability > 0:
                    seen = self.foreground(output, predict, grid, probability)
                    mask = self.attention_mask(seen, tokens)
            tokens = self.access.run(block, tokens, mask, rotary)
        self.add_prediction(output, tokens, grid)
        return output

    def add_prediction(self, output: DecoderOutput, tokens: Tensor, grid: tuple[int, int]) -> None:
        """What segments and masks are predicted from, of tokens (B, T, C)."""
        normed = self.vit.get_submodule(self.access.norm)(tokens)
        patches = normed[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
        finest = patches
        for block in self.upscale:
            finest = block(finest)
        features = PixelFeatures(patches, [patches, finest], None, None, finest)
        output.segment_embeddings.append(normed[:, : self.config.num_queries])
        output.features.append(features)

    def foreground(
        self, output: DecoderOutput, predict: Callable[..., SegmentLogits], grid: tuple[int, int], probability: float
    ) -> Tensor:
        """Patches that queries see (B, N, h w): those of their masks, or all."""
        with torch.no_grad():
            masks = predict(output.segment_embeddings[-1], output.features[-1], grid).mask_logits
        seen = masks.flatten(2) > 0
        if probability < 1:
            seen |= torch.rand(seen.shape[:2], device=seen.device)[..., None] > probability
        return seen

    def attention_mask(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """(B, 1, T, T), to be added to the scores."""
        queries, patches = seen.shape[1:]
        mask = tokens.new_zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
        mask[:, 0, :queries, -patches:].masked_fill_(~seen, torch.finfo(tokens.dtype).min)
        return mask

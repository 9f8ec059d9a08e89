"""EoMT: a plain ViT whose last blocks see the queries as tokens is the whole network (Kerssies et al., Your ViT is
Secretly an Image Segmentation Model, CVPR 2025).

Shape legend: B images, N queries, C channels of the ViT, (h, w) its grid of patches, T = N + prefix tokens + h * w.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import PixelNorm, auto_backbone, patch_size_of, upsample2x
from .layers import ValidRegion, all_rows
from .pixel_decoders import PixelFeatures
from .transformer_decoders import DecoderOutput, SegmentLogits


def embed(vit: Any, pixel_values: Tensor) -> Tensor:
    """Tokens of images, by the embeddings of a ViT of transformers: (B, 3, H, W) -> (B, prefix + h w, C)."""
    return vit.embeddings(pixel_values)


def _embed_timm(vit: Any, pixel_values: Tensor) -> Tensor:
    model = vit._backbone.model
    return model.norm_pre(model._pos_embed(model.patch_embed(pixel_values)))


class _Access(NamedTuple):
    """Where a family of ViTs has its parts."""

    layers: str
    norm: str
    run: Callable[..., Tensor]  # (block, tokens, mask, what `rotary` gives) -> tokens
    rotary: str | None = None
    embed: Callable[[Any, Tensor], Tensor] = embed  # (ViT, image) -> tokens, those of patches last


def _run_dinov2(block: Any, tokens: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
    """By the modules of a block: until transformers 5.2x its own forward took no mask."""
    attention = block.attention
    inner = getattr(attention, "attention", attention)
    if hasattr(attention, "q_proj"):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    else:
        projections = (inner.query, inner.key, inner.value, attention.output.dense)
    heads = getattr(inner, "num_attention_heads", None) or inner.num_heads
    normed = block.norm1(tokens)
    queries, keys, values = (project(normed).unflatten(2, (heads, -1)).transpose(1, 2) for project in projections[:3])
    dropout = getattr(inner, "attention_dropout", getattr(inner, "dropout_prob", 0.0)) if block.training else 0.0
    attended = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)  # (B, heads, T, C / heads)
    tokens = tokens + block.drop_path(block.layer_scale1(projections[3](attended.transpose(1, 2).flatten(2))))
    return tokens + block.drop_path(block.layer_scale2(block.mlp(block.norm2(tokens))))


def _run_block(block: Any, tokens: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
    """By its own forward; DINOv3 turns the last tokens only, those of patches."""
    options = {} if rotary is None else {"position_embeddings": rotary}
    # Not its own call, which checkpoints activations: `EncoderOnly` does, for all families.
    return nn.Module.__call__(block, tokens, attention_mask=mask, **options)


def _run_timm(block: Any, tokens: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
    """Without a mask older versions of timm do, too."""
    return block(tokens) if mask is None else block(tokens, attn_mask=mask)


ACCESS = {
    "dinov2": _Access("encoder.layer", "layernorm", _run_dinov2),
    "dinov2_with_registers": _Access("encoder.layer", "layernorm", _run_dinov2),
    "dinov3_vit": _Access("model.layer", "norm", _run_block, "rope_embeddings"),
    "timm_backbone": _Access("_backbone.model.blocks", "_backbone.model.norm", _run_timm, embed=_embed_timm),
}


def _build_vit(config: Any) -> Any:
    """The ViT of a `backbone_config`, without parts that only its pretraining has.

    Raises:
        ValueError: a model of timm that is not of its class VisionTransformer.
    """
    vit = auto_backbone(config)
    if config.model_type != "timm_backbone":
        vit.embeddings.register_parameter("mask_token", None)
        return vit
    model = getattr(vit._backbone, "model", vit._backbone)
    if "VisionTransformer" not in [base.__name__ for base in type(model).__mro__]:
        raise ValueError(
            "architecture='encoder_only' takes plain ViTs of timm, of its class VisionTransformer, but backbone_config "
            f"has {config.backbone!r}, of {type(model).__name__}. DINOv3 is there as a model of transformers."
        )
    model.norm = copy.deepcopy(model.blocks[0].norm1)  # which timm leaves out of what gives feature maps
    return vit


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
    (`mask_probabilities`) that is annealed to 0; so inference needs no masks. With `freeze_backbone` the ViT does not
    learn, but its queries, upscaling and heads do.

    Args:
        config: `backbone_config` of a family in `ACCESS`, `num_queries`, `query_blocks`, `upscale_blocks`.

    Raises:
        ValueError: another family of ViTs, or more blocks with queries than there are.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        vit_config = config.backbone_config
        access = ACCESS.get(vit_config.model_type)
        if access is None:
            raise ValueError(
                f"architecture='encoder_only' takes a plain ViT, model_type {' or '.join(ACCESS)}, but backbone_config "
                f"has {vit_config.model_type!r}."
            )
        self.vit: Any = _build_vit(vit_config)
        self.access = access
        takes_mask = "attention_mask" in inspect.signature(type(self.layers[0]).forward).parameters
        self.run_block = _run_block if takes_mask else access.run
        if not 0 < config.query_blocks <= len(self.layers):
            raise ValueError(f"query_blocks={config.query_blocks} of {len(self.layers)} blocks of the ViT.")
        self.config = config
        size = self.vit.channels[-1]
        config.hidden_size = config.mask_feature_size = size  # which a configuration of timm does not say
        self.patch_size: Any = patch_size_of(self.vit)
        self.queries_embedder = nn.Embedding(config.num_queries, size)
        self.upscale = nn.ModuleList(UpscaleBlock(size) for _ in range(config.upscale_blocks))
        self.gradient_checkpointing = False  # set by transformers, with the function that checkpoints
        self._gradient_checkpointing_func: Any = None

    @property
    def layers(self) -> Any:
        """Blocks of the ViT."""
        return self.vit.get_submodule(self.access.layers)

    def forward(self, pixel_values: Tensor, predict: Callable[..., SegmentLogits], every_block: bool) -> DecoderOutput:
        """Segment embeddings (B, N, C) and pixel features of each supervised block, deepest last.

        Args:
            pixel_values: (B, 3, H, W), of whole patches.
            predict: the segmentation module, which makes the masks that queries see.
            every_block: of all blocks with queries; else only what masks and the result need.

        Raises:
            ValueError: images that are no whole patches.
        """
        grid = self.grid_of(pixel_values)
        tokens = self.access.embed(self.vit, pixel_values)  # (B, prefix + h w, C)
        rotary = None if self.access.rotary is None else self.vit.get_submodule(self.access.rotary)(pixel_values)
        first = len(self.layers) - self.config.query_blocks
        output = DecoderOutput([], [], [], [], predicts_input=True)
        for number, block in enumerate(self.layers):
            mask = None
            if number == first:
                queries = all_rows(self.queries_embedder, tokens.device).expand(tokens.shape[0], -1, -1)
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
            if self.gradient_checkpointing and self.training:
                tokens = self._gradient_checkpointing_func(self.run_block, block, tokens, mask, rotary)
            else:
                tokens = self.run_block(block, tokens, mask, rotary)
        self.add_prediction(output, tokens, grid)
        return output

    def without_padding(
        self, pixel_values: Tensor, region: ValidRegion, predict: Callable[..., SegmentLogits], every_block: bool
    ) -> DecoderOutput:
        """As `forward`, but the ViT sees each image up to its last patches alone: it runs once for each of these sizes.

        Maps are of the padded batch. On a GPU the host waits for the sizes of the images; and processes that share out
        the weights (FSDP) must have equally many sizes, else they wait for each other.

        Args:
            pixel_values: (B, 3, H, W), the padded batch.
            region: what of it is image.
            predict: as of `forward`.
            every_block: as of `forward`.
        """
        grid = self.grid_of(pixel_values)
        groups: dict[tuple[int, int], list[int]] = {}  # images of each size in patches
        sizes = region.sizes.clamp(min=1).tolist()
        for image, size in enumerate(sizes):
            height, width = (-(-length // patch) for length, patch in zip(size, self.patch_size, strict=True))
            groups.setdefault((height, width), []).append(image)
        if all(tuple(size) == region.padded_size for size in sizes):
            return self(pixel_values, predict, every_block)
        inside = region.mask_at(*region.padded_size)[:, None].to(pixel_values.device)
        pixel_values = pixel_values.where(inside, 0.0)  # within the last patches too
        if [*groups] == [grid]:
            return self(pixel_values, predict, every_block)

        outputs = []
        for (height, width), images in groups.items():
            crops = pixel_values[images, :, : height * self.patch_size[0], : width * self.patch_size[1]]
            outputs.append(self(crops, predict, every_block))
        return _in_padded_batch(outputs, groups, grid)

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches of the images."""
        height, width = pixel_values.shape[-2:]
        rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(
                f"Images of {height} x {width} pixels are no whole patches of {rows} x {columns}: pad them to a "
                f"multiple (size_divisor={math.lcm(rows, columns)} of the image processor)."
            )
        return height // rows, width // columns

    def add_prediction(self, output: DecoderOutput, tokens: Tensor, grid: tuple[int, int]) -> None:
        """What segments and masks are predicted from, of tokens (B, T, C).

        Args:
            output: to which the embeddings (B, N, C) and features are appended.
            tokens: those of queries first, those of patches last.
            grid: patches (h, w).
        """
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
        """Patches that queries see (B, N, h w): those of their masks, or all.

        Args:
            output: its last entry is what masks are predicted of.
            predict: the segmentation module.
            grid: patches (h, w).
            probability: that a query sees the patches of its mask alone.
        """
        with torch.no_grad():
            masks = predict(output.segment_embeddings[-1], output.features[-1], grid).mask_logits
        seen = masks.flatten(2) > 0
        # Drawn for 1 too: a compiled program, which has probabilities as symbols, is then the same for 1 and below.
        return seen | (torch.rand(seen.shape[:2], device=seen.device)[..., None] > probability)

    def attention_mask(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """(B, 1, T, T), to be added to the scores."""
        queries, patches = seen.shape[1:]
        mask = tokens.new_zeros(tokens.shape[0], 1, tokens.shape[1], tokens.shape[1])
        mask[:, 0, :queries, -patches:].masked_fill_(~seen, torch.finfo(tokens.dtype).min)
        return mask


def _in_padded_batch(
    outputs: list[DecoderOutput], groups: dict[tuple[int, int], list[int]], grid: tuple[int, int]
) -> DecoderOutput:
    """One output of the batch, of those of its groups; the border of an image goes on over its padding.

    Args:
        outputs: of each group.
        groups: grids of patches, and the places in the batch of images that have them.
        grid: of the padded batch.
    """
    images = [image for places in groups.values() for image in places]
    order = sorted(range(len(images)), key=images.__getitem__)

    def joined(of_groups: Iterable[Tensor]) -> Tensor:
        results = torch.cat([*of_groups])
        return results.index_select(0, torch.tensor(order, device=results.device))

    def extended(features: Tensor, of_grid: tuple[int, int]) -> Tensor:
        for dim, length, patches in zip((2, 3), grid, of_grid, strict=True):
            cells = features.shape[dim]
            index = torch.arange(cells * length // patches, device=features.device).clamp(max=cells - 1)
            features = features.index_select(dim, index)
        return features

    whole = DecoderOutput([], [], [], [], predicts_input=True)
    for embeddings in zip(*(output.segment_embeddings for output in outputs), strict=True):
        whole.segment_embeddings.append(joined(embeddings))
    for features in zip(*(output.features for output in outputs), strict=True):
        patches, finest = (
            joined(extended(one.pyramid[level], size) for one, size in zip(features, groups, strict=True))
            for level in (0, 1)
        )
        whole.features.append(PixelFeatures(patches, [patches, finest], None, None, finest))
    return whole

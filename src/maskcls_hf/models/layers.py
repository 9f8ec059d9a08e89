"""Layers that more than one part of the network is made of."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer


class ValidRegion:
    """The part of a padded batch that is image; padding lies at the bottom and on the right.

    Args:
        sizes (`torch.Tensor` of shape `(B, 2)`): height and width of each image in pixels of the network input.
        padded_size (`tuple[int, int]`): (H, W) of the network input.
        complete (`bool`): nothing is known to be padded.

    Examples:
        >>> region = ValidRegion(torch.tensor([[32, 64]]), (64, 64), complete=False)
        >>> region.mask_at(2, 2).tolist()
        [[[True, True], [False, False]]]
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


class ConvNorm(nn.Module):
    """Convolution without bias, group normalization, optional ReLU (paper Appendix A, pixel decoder); `xavier`: with a
    bias, and Xavier initialization.

    With a `region`, padding reaches neither into the convolution nor into the statistics: an image gives the
    same features whatever it is padded to.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, relu: bool, xavier: bool = False):
        super().__init__()
        conv = XavierConv2d if xavier else partial(nn.Conv2d, bias=False)
        self.conv = conv(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        # The paper's 32 groups; where they do not divide the channels, as many as leave more than one in each.
        groups = 32 if out_channels % 32 == 0 else math.gcd(32, out_channels // 2)
        self.norm = MaskedGroupNorm(groups, out_channels)
        self.relu = relu

    def forward(self, features: Tensor, region: ValidRegion | None = None) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w).

        Args:
            features: of the whole padded batch.
            region: what of it is image. None: all is looked at.
        """
        if region is None:
            features = self.norm(self.conv(features))
        else:
            inside = region.mask_at(*features.shape[-2:])[:, None]  # (B, 1, h, w)
            features = self.norm(self.conv(features * inside), inside)
        return features.relu_() if self.relu else features


class XavierConv2d(nn.Conv2d):
    """Says how `MaskClsPreTrainedModel` is to initialize it."""


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm that may look at a part of the cells only: (B, C, h, w), (B, 1, h, w) -> (B, C, h, w)."""

    def forward(self, features: Tensor, inside: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w), with the statistics of the cells `inside` (B, 1, h, w); None: of all."""
        if inside is None:
            return super().forward(features)
        return masked_group_norm(features, inside, self.num_groups, self.weight, self.bias, self.eps)


def masked_group_norm(
    features: Tensor, inside: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """A group norm with the statistics of the cells `inside` only: (B, C, h, w), (B, 1, h, w) -> (B, C, h, w).

    Args:
        features: computed with in float32 at least.
        inside: True where there is image.
        num_groups: of channels.
        weight: (C,); None: 1.
        bias: (C,); None: 0.
        eps: added to the variance.
    """
    batch, channels, height, width = features.shape
    wide = torch.promote_types(features.dtype, torch.float32)
    grouped = features.to(wide).reshape(batch, num_groups, -1, height, width)
    weights = inside[:, :, None].to(grouped.dtype)  # (B, 1, 1, h, w)
    count = (weights.sum(dim=(2, 3, 4), keepdim=True) * grouped.shape[2]).clamp(min=1)
    mean = (grouped * weights).sum(dim=(2, 3, 4), keepdim=True) / count
    variance = ((grouped - mean).square() * weights).sum(dim=(2, 3, 4), keepdim=True) / count
    normed = ((grouped - mean) * torch.rsqrt(variance + eps)).view(batch, channels, height, width)
    if weight is not None:
        normed = normed * weight.to(wide)[:, None, None]
    if bias is not None:
        normed = normed + bias.to(wide)[:, None, None]
    return normed.to(features.dtype)


class MLP(nn.Module):
    """`num_layers` linear layers with an activation between them (paper Section 3.2, mask embeddings)."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ):
        super().__init__()
        self.activation = activation
        sizes = [in_channels] + [hidden_channels] * (num_layers - 1) + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_channels) -> (..., out_channels)."""
        for layer in self.layers[:-1]:
            features = self.activation(layer(features))
        return self.layers[-1](features)


class QueryTable(nn.Embedding):
    """A learned vector for each query, zero at first."""

    def reset_parameters(self) -> None:
        """Set all vectors to zero."""
        nn.init.zeros_(self.weight)


def all_rows(table: Any, device: torch.device) -> Tensor:
    """All vectors of an embedding, by calling it: adapters and offloaded weights are there only then."""
    return table(torch.arange(table.weight.shape[0], device=device))


def sine_positions(features: Tensor, inside: Tensor | None, temperature: float = 10000.0) -> Tensor:
    """Sine position embeddings of a grid (DETR), normalized to 0..2 pi over each image: (B or 1, h * w, C).

    Args:
        temperature: waves are from 1 to nearly this many times as long as the image.
        features (`torch.Tensor` of shape `(B, C, h, w)`): gives shape, dtype and device.
        inside (`torch.Tensor` of shape `(B, h, w)`, *optional*): True inside the images.

    Examples:
        >>> sine_positions(torch.zeros(1, 8, 4, 6), None).shape
        torch.Size([1, 24, 8])
    """
    _, channels, height, width = features.shape
    device = features.device
    rows = torch.arange(1, height + 1, device=device, dtype=torch.float32)[None]  # (1, h)
    columns = torch.arange(1, width + 1, device=device, dtype=torch.float32)[None]  # (1, w)
    if inside is None:
        last_row, last_column = rows[:, -1:], columns[:, -1:]
    else:
        last_row = inside.any(2).sum(1, keepdim=True).float()  # (B, 1)
        last_column = inside.any(1).sum(1, keepdim=True).float()

    index = torch.arange(channels // 2, device=device, dtype=torch.float32)
    wavelengths = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / (channels // 2))

    def waves(positions: Tensor, last: Tensor) -> Tensor:  # (b, n) -> (b, n, C / 2), sine and cosine alternating
        angles = (positions / (last + 1e-6) * 2 * math.pi)[..., None] / wavelengths
        return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)

    rows, columns = waves(rows, last_row), waves(columns, last_column)
    batch = rows.shape[0]
    grid = torch.cat(
        [
            rows[:, :, None].expand(batch, height, width, channels // 2),
            columns[:, None].expand(batch, height, width, channels // 2),
        ],
        dim=-1,
    )
    return grid.flatten(1, 2).to(features.dtype)


class XavierLinear(nn.Linear):
    """Linear layer of a transformer; says how `MaskClsPreTrainedModel` is to initialize it."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0, zero_bias: bool = False):
        super().__init__(in_features, out_features)
        self.gain = gain
        self.zero_bias = zero_bias


class Attention(nn.Module):
    """Multi-head attention whose keys and values may come from another sequence.

    `forward(queries (B, n, C), keys (B, m, C), values (B, m, C), key_mask (B, m) or (B, n, m))` returns the attended
    values (B, n, C) and, where they were asked for, the attention weights (B, heads, n, m).
    """

    def __init__(self, config: Any, hidden_size: int):
        super().__init__()
        self.config = config  # holds the attention implementation of the moment
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        # torch's MultiheadAttention, which the paper's code uses, draws the three as one matrix of 3C rows.
        self.q_proj = XavierLinear(hidden_size, hidden_size, gain=1 / math.sqrt(2), zero_bias=True)
        self.k_proj = XavierLinear(hidden_size, hidden_size, gain=1 / math.sqrt(2), zero_bias=True)
        self.v_proj = XavierLinear(hidden_size, hidden_size, gain=1 / math.sqrt(2), zero_bias=True)
        self.o_proj = XavierLinear(hidden_size, hidden_size, zero_bias=True)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        key_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from queries to keys.

        Args:
            queries: (B, n, C).
            keys: (B, m, C).
            values: (B, m, C).
            key_mask: True where a key is looked at: (B, m), or (B, n, m) for each query. None: everywhere.
            output_attentions: return the weights too, for which they are written down.

        Returns:
            Attended values (B, n, C), and weights (B, heads, n, m) or None.
        """

        def heads(features: Tensor) -> Tensor:  # (B, n, C) -> (B, heads, n, C / heads)
            return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        queries, keys, values = heads(self.q_proj(queries)), heads(self.k_proj(keys)), heads(self.v_proj(values))
        mask = key_mask if key_mask is None else key_mask[:, None] if key_mask.ndim == 3 else key_mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        if output_attentions or self.config._attn_implementation == "eager":
            scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = scores.float().softmax(-1).to(values.dtype)
            attended = F.dropout(weights, dropout) @ values
        else:
            weights = None
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), weights


class FeedForward(nn.Module):
    """The two-layer feed-forward block of a transformer layer."""

    def __init__(self, hidden_size: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.fc1 = XavierLinear(hidden_size, ffn_dim)
        self.fc2 = XavierLinear(ffn_dim, hidden_size)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        return self.fc2(F.dropout(F.relu(self.fc1(features)), self.dropout, self.training))


class TransformerLayer(GradientCheckpointingLayer):
    """Post-norm transformer layer of DETR; with `cross_attention` a decoder layer, else an encoder layer.

    Positions are added to queries and keys, never to values. `cross_first`: cross-attention comes before
    self-attention (Mask2Former, Section 3.2.2).
    """

    def __init__(self, config: Any, hidden_size: int, ffn_dim: int, cross_attention: bool, cross_first: bool = False):
        super().__init__()
        self.dropout = config.dropout
        self.cross_first = cross_first
        self.self_attn = Attention(config, hidden_size)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        if cross_attention:
            self.cross_attn = Attention(config, hidden_size)
            self.cross_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.mlp = FeedForward(hidden_size, ffn_dim, config.dropout)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        placed_context: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One layer: (B, n, C) -> (B, n, C).

        Args:
            hidden_states: (B, n, C).
            positions: (B or 1, n, C), added to queries and keys.
            key_mask: True = attend; masks the context, (B, m) or (B, n, m), or the sequence itself where there is no
                context.
            context: (B, m, C), what cross-attention looks at. None: an encoder layer.
            placed_context: the context with its positions added, (B, m, C).
            output_attentions: return weights too.

        Returns:
            hidden_states, and the weights of self-attention and, with a context, of cross-attention (None: not asked
            for).
        """

        def add(update: Tensor, norm: nn.LayerNorm, residual: Tensor) -> Tensor:
            return norm(residual + F.dropout(update, self.dropout, self.training))

        def attend_to_itself(states: Tensor) -> tuple[Tensor, Tensor | None]:
            placed = states + positions
            mask = key_mask if context is None else None
            attended, weights = self.self_attn(placed, placed, states, mask, output_attentions)
            return add(attended, self.self_attn_layer_norm, states), weights

        def attend_to_context(states: Tensor) -> tuple[Tensor, Tensor | None]:
            attended, weights = self.cross_attn(
                states + positions, placed_context, context, key_mask, output_attentions
            )
            return add(attended, self.cross_attn_layer_norm, states), weights

        if context is None:
            hidden_states, weights = attend_to_itself(hidden_states)
            attentions = [weights]
        elif self.cross_first:
            hidden_states, cross_weights = attend_to_context(hidden_states)
            hidden_states, weights = attend_to_itself(hidden_states)
            attentions = [weights, cross_weights]
        else:
            hidden_states, weights = attend_to_itself(hidden_states)
            hidden_states, cross_weights = attend_to_context(hidden_states)
            attentions = [weights, cross_weights]
        return add(self.mlp(hidden_states), self.final_layer_norm, hidden_states), attentions

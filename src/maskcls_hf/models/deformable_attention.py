"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021), in plain PyTorch.

Shape legend: B images, Q queries, S cells of all levels, one level after the other, R levels, J points a level,
G heads, C channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers import FeedForward, XavierLinear

Sizes = list[tuple[int, int]]  # height and width of each level


class ZeroLinear(nn.Linear):
    """A linear layer that is zero at first."""


class SamplingOffsets(nn.Linear):
    """(B, Q, C) -> offsets in cells; at first each head looks in a direction of its own, point by point further."""

    def __init__(self, hidden_size: int, heads: int, levels: int, points: int):
        super().__init__(hidden_size, heads * levels * points * 2)
        self.shape = (heads, levels, points)

    def initial_bias(self) -> Tensor:
        heads, levels, points = self.shape
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)  # (G, 2), (x, y)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1, dtype=torch.float32)[:, None]  # (J, 1)
        return (directions[:, None, None] * steps).expand(heads, levels, points, 2).flatten()


class DeformableAttention(nn.Module):
    """Each query looks at `points` places a level around its own, for each head.

    Offsets, places and weights are computed in float32 at least: bfloat16 holds no half cells beyond 128.
    """

    def __init__(self, hidden_size: int, num_heads: int, levels: int, points: int):
        super().__init__()
        self.shape = (num_heads, levels, points)
        self.sampling_offsets = SamplingOffsets(hidden_size, num_heads, levels, points)
        self.attention_weights = ZeroLinear(hidden_size, num_heads * levels * points)
        self.value_proj = XavierLinear(hidden_size, hidden_size, zero_bias=True)
        self.output_proj = XavierLinear(hidden_size, hidden_size, zero_bias=True)

    def forward(
        self, queries: Tensor, context: Tensor, reference: Tensor, sizes: Sizes, inside: Tensor | None = None
    ) -> Tensor:
        """(B, Q, C), (B, S, C) -> (B, Q, C).

        Args:
            reference (`torch.Tensor` of shape `(B or 1, Q, R, 2)`): where each query is on each level, (x, y) in cells;
                the center of the first cell is (0.5, 0.5).
            inside (`torch.Tensor` of shape `(B, S)`, *optional*): True where there is image; the rest counts as zero,
                as what is beyond the levels does.
        """
        heads, levels, points = self.shape
        values = self.value_proj(context)  # (B, S, C)
        if inside is not None:
            values = values.masked_fill(~inside[..., None], 0)
        values = values.unflatten(2, (heads, -1))  # (B, S, G, C / G)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        offsets = self.sampling_offsets(queries).to(dtype).unflatten(2, (heads, levels, points, 2))
        places = reference[:, :, None, :, None].to(dtype) + offsets  # (B, Q, G, R, J, 2)
        weights = self.attention_weights(queries).to(dtype).unflatten(2, (heads, -1)).softmax(-1)  # (B, Q, G, R J)
        attended = attend(values.to(dtype), sizes, places, weights)
        return self.output_proj(attended.to(values.dtype))


def attend(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values at places between the cells, bilinearly: (B, S, G, D) -> (B, Q, G D).

    Args:
        places (`torch.Tensor` of shape `(B, Q, G, R, J, 2)`): (x, y) in cells of the level.
        weights (`torch.Tensor` of shape `(B, Q, G, R J)`): of the places.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return attend_by_gathering(values, sizes, places, weights)
    if values.device.type == "cpu":
        return attend_by_bags(values, sizes, places, weights)
    return attend_by_grids(values, sizes, places, weights)


def attend_by_grids(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """By `grid_sample`, which is the fastest on a GPU."""
    batch, _, heads, channels = values.shape
    sampled = []
    levels = values.split([height * width for height, width in sizes], dim=1)
    for level, (values_of_level, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        image = values_of_level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = places[:, :, :, level] * (2 / places.new_tensor([width, height])) - 1  # (B, Q, G, J, 2)
        grid = grid.transpose(1, 2).flatten(0, 1)  # (B G, Q, J, 2)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B G, 1, Q, R J)
    attended = (torch.cat(sampled, -1) * weights).sum(-1)  # (B G, D, Q)
    return attended.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def attend_by_bags(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """As bags of embeddings, which a CPU sums without writing down what it sums."""
    batch, cells, heads, channels = values.shape
    index, shares = corners(sizes, places, weights)  # (B, Q, G, 4 R J)
    image = torch.arange(batch, device=index.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=index.device).view(-1, 1)
    rows = ((index + image * cells) * heads + head).flatten(0, 2)
    bags = F.embedding_bag(rows, values.reshape(-1, channels), per_sample_weights=shares.flatten(0, 2), mode="sum")
    return bags.view(batch, -1, heads * channels)


def attend_by_gathering(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """In operations that every exporter knows."""
    channels = values.shape[3]
    index, shares = corners(sizes, places, weights)  # (B, Q, G, T)
    rows = index.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, channels)  # (B, G, Q T, D)
    found = values.transpose(1, 2).gather(2, rows).unflatten(2, index.shape[1::2])  # (B, G, Q, T, D)
    return (found * shares.transpose(1, 2)[..., None]).sum(3).transpose(1, 2).flatten(2)


def corners(sizes: Sizes, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each place, as indices into all cells, and their shares: (B, Q, G, 4 R J) each."""
    index, shares = [], []
    of_levels = weights.unflatten(3, (len(sizes), -1))  # (B, Q, G, R, J)
    start = 0
    for level, (height, width) in enumerate(sizes):
        place = places[:, :, :, level] - 0.5  # (B, Q, G, J, 2)
        first = place.floor()
        fraction = place - first
        weight = of_levels[:, :, :, level]  # (B, Q, G, J)
        column, row = first.long().unbind(-1)
        right, down = fraction.unbind(-1)
        for below, share_of_row in ((0, 1 - down), (1, down)):
            y = row + below
            share_of_row = share_of_row * weight * ((y >= 0) & (y < height))
            y = start + y.clamp(0, height - 1) * width
            for beside, share_of_column in ((0, 1 - right), (1, right)):
                x = column + beside
                shares.append(share_of_row * share_of_column * ((x >= 0) & (x < width)))
                index.append(y + x.clamp(0, width - 1))
        start += height * width
    return torch.cat(index, -1), torch.cat(shares, -1)


class DeformableLayer(GradientCheckpointingLayer):
    """Post-norm encoder layer with deformable attention of all levels to all levels."""

    def __init__(self, config, hidden_size: int, levels: int, points: int):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = DeformableAttention(hidden_size, config.num_attention_heads, levels, points)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.mlp = FeedForward(hidden_size, config.encoder_ffn_dim, config.dropout)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, reference: Tensor, sizes: Sizes, inside: Tensor | None
    ) -> Tensor:
        """hidden_states (B, S, C), positions (B or 1, S, C); the rest as in [`DeformableAttention`]."""
        attended = self.self_attn(hidden_states + positions, hidden_states, reference, sizes, inside)
        attended = F.dropout(attended, self.dropout, self.training)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)
        update = F.dropout(self.mlp(hidden_states), self.dropout, self.training)
        return self.final_layer_norm(hidden_states + update)


def reference_points(sizes: Sizes, valid: list[Tensor] | None, like: Tensor) -> Tensor:
    """Centers of all cells, as places on every level: (B or 1, S, R, 2), (x, y) in cells.

    Args:
        valid: of each level the cells that are image (B, 2), rows and columns; None: all.
    """
    if valid is None:
        lengths = [like.new_tensor([[height, width]]) for height, width in sizes]
    else:
        lengths = [length.to(like.dtype) for length in valid]
    every = torch.stack(lengths, 1).flip(2)  # (B, R, 2), columns and rows
    points = []
    for level, (height, width) in enumerate(sizes):
        rows = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
        columns = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
        cells = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], -1).flatten(0, 1)  # (n, 2)
        shares = cells / every[:, level, None]  # (B, n, 2) of the image
        points.append(shares[:, :, None] * every[:, None])  # (B, n, R, 2)
    return torch.cat(points, 1)

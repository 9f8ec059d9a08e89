"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021), in plain PyTorch.

Shape legend: B images, Q queries, S cells of all levels, one level after the other, S' with their borders, R levels, J
points a level, G heads, C channels, D = C / G, T = 4 R J cells that a query looks at.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
        """Offsets (G R J 2,): each head has a direction, in which point after point is one cell further away."""
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
            queries (`torch.Tensor` of shape `(B, Q, C)`): what looks.
            context (`torch.Tensor` of shape `(B, S, C)`): the cells that are looked at, level after level.
            sizes: height and width of each level in cells.
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
        values (`torch.Tensor` of shape `(B, S, G, D)`): of all cells, level after level.
        sizes: height and width of each level in cells.
        places (`torch.Tensor` of shape `(B, Q, G, R, J, 2)`): (x, y) in cells of the level.
        weights (`torch.Tensor` of shape `(B, Q, G, R J)`): of the places.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return attend_by_gathering(values, sizes, places, weights)
    if values.device.type == "cpu":
        return attend_by_bags(values, sizes, places, weights)
    return attend_by_grids(values, sizes, places, weights)


def attend_by_grids(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """By `grid_sample`, which is the fastest on a GPU.

    Arguments and result are those of [`attend`].
    """
    batch, _, heads, channels = values.shape
    sampled = []
    levels = values.split([height * width for height, width in sizes], dim=1)
    for level, (values_of_level, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        image = values_of_level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = places[:, :, :, level] * (2 / lengths_as([width, height], places)) - 1  # (B, Q, G, J, 2)
        grid = grid.transpose(1, 2).flatten(0, 1)  # (B G, Q, J, 2)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B G, 1, Q, R J)
    attended = (torch.cat(sampled, -1) * weights).sum(-1)  # (B G, D, Q)
    return attended.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def lengths_as(lengths: Sequence[int], like: Tensor) -> Tensor:
    """(n,) of the dtype of `like`. Exporters give symbols, of which `torch.tensor` would make constants."""
    if any(isinstance(length, torch.SymInt) for length in lengths):
        return torch.stack([torch.full((), length, dtype=like.dtype, device=like.device) for length in lengths])
    return like.new_tensor(lengths)


def attend_by_bags(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """As bags of embeddings, which a CPU sums without writing down what it sums.

    Arguments and result are those of [`attend`].
    """
    return _WeightedBags.apply(_pad_levels(values, sizes), places, weights, sizes)


def attend_by_gathering(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """In operations that every exporter knows.

    Arguments and result are those of [`attend`].
    """
    padded = _pad_levels(values, sizes)  # (B, G, S', D)
    first, fraction = _first_cells(sizes, places)
    cells = _corner_cells(first, sizes).flatten(3).transpose(1, 2).flatten(2)  # (B, G, Q T)
    shares = _corner_shares(fraction, weights).flatten(3).transpose(1, 2)  # (B, G, Q, T)
    found = padded.gather(2, cells.long()[..., None].expand(-1, -1, -1, padded.shape[3])).unflatten(2, shares.shape[2:])
    return (found * shares[..., None]).sum(3).transpose(1, 2).flatten(2)


class _WeightedBags(torch.autograd.Function):
    """The sums and their gradients.

    Torch's gradient of a bag adds up value by value; here the places are sorted by their cells, and what a cell is part
    of is a bag again.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
        first, fraction = _first_cells(sizes, places)
        bags = _bags_of(first, sizes, padded)
        shares = _corner_shares(fraction, weights)
        ctx.sizes = sizes
        ctx.save_for_backward(padded, places, weights)
        attended = F.embedding_bag(bags, padded.flatten(0, 2), per_sample_weights=shares.view_as(bags), mode="sum")
        return attended.view(*places.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, places, weights = ctx.saved_tensors
        grad = grad.reshape(-1, padded.shape[3])  # (B Q G, D)
        first, fraction = _first_cells(ctx.sizes, places)
        of_values = of_places = of_weights = None
        if ctx.needs_input_grad[0]:
            of_values = _grad_of_values(grad, first, _corner_shares(fraction, weights), ctx.sizes, padded)
        if any(ctx.needs_input_grad[1:]):
            products = _sampled_products(grad, _bags_of(first, ctx.sizes, padded), padded.flatten(0, 2))
            upper_left, upper_right, lower_left, lower_right = products.view(*first.shape, 4).unbind(-1)
            right, down = fraction.unbind(-1)
            upper, lower = upper_left.lerp(upper_right, right), lower_left.lerp(lower_right, right)
            of_weights = upper.lerp(lower, down).flatten(3)
            to_the_right = (upper_right - upper_left).lerp(lower_right - lower_left, down)
            of_places = torch.stack([to_the_right, lower - upper], -1) * weights.view_as(first)[..., None]
            # Beyond a level, where places are moved to its border, nothing changes.
            of_places *= (places >= -0.5) & (places <= _level_sizes(ctx.sizes, places) + 0.5)
        return of_values, of_places, of_weights, None


def _grad_of_values(grad: Tensor, first: Tensor, shares: Tensor, sizes: Sizes, padded: Tensor) -> Tensor:
    """The gradient (B, G, S', D) of padded values, of that of the sums (B Q G, D)."""
    rows, order = (first + _blocks_of(padded)).flatten().sort()  # (B Q G R J,)
    starts = torch.searchsorted(rows, torch.arange(padded.shape[:3].numel(), dtype=rows.dtype))
    bags = order.div(first.shape[3:].numel(), rounding_mode="floor")
    sorted_shares = shares.flatten(0, 4).index_select(0, order)
    total, *others = (
        F.embedding_bag(bags, grad, starts, per_sample_weights=share, mode="sum").view_as(padded)
        for share in sorted_shares.t().contiguous()
    )
    start = 0
    for height, width in sizes:
        end = start + (height + BORDER) * (width + BORDER)
        for part, step in zip(others, _corner_steps(width)[1:], strict=True):
            total[:, :, start + step : end] += part[:, :, start : end - step]
        start = end
    return total


def _sampled_products(grad: Tensor, bags: Tensor, rows: Tensor) -> Tensor:
    """Of each bag's gradient (n, D) with the rows (S, D) in the bag (n, T): (n, T)."""
    if torch.compiler.is_compiling():  # which fuses it, and has no sparse tensors
        return (rows[bags] * grad[:, None]).sum(-1)
    starts = torch.arange(0, bags.numel() + 1, bags.shape[1], dtype=bags.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            starts,
            bags.flatten(),
            grad.new_zeros(1).expand(bags.numel()),
            (len(grad), len(rows)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, grad, rows.t(), beta=0.0).values()


BORDER = 3  # cells of zeros: one before a level, two behind it, where places beyond the level are moved to


def _pad_levels(values: Tensor, sizes: Sizes) -> Tensor:
    """Each level with a border of zeros, one after the other: (B, S, G, D) -> (B, G, S', D)."""
    levels = values.transpose(1, 2).split([height * width for height, width in sizes], 2)
    padded = [F.pad(level.unflatten(2, size), (0, 0, 1, 2, 1, 2)) for level, size in zip(levels, sizes, strict=True)]
    return torch.cat([level.flatten(2, 3) for level in padded], 2)


def _first_cells(sizes: Sizes, places: Tensor) -> tuple[Tensor, Tensor]:
    """The upper left of the four cells around each place, as an index into the padded levels (B, Q, G, R, J) int32,
    and how far it is from there to the lower right one (B, Q, G, R, J, 2).
    """
    points = places.shape[4]
    size = _level_sizes(sizes, places)
    corner = (places - 0.5).clamp(-torch.ones_like(size), size)
    cell = corner.detach().floor()
    # A place that is no number is none of a cell either, and its shares say so.
    column, row = cell.int().clamp(-torch.ones_like(size, dtype=torch.int32), size.int()).unbind(-1)
    starts = [0, *accumulate((height + BORDER) * (width + BORDER) for height, width in sizes)]
    widths = lengths_as([width + BORDER for _, width in sizes for _ in range(points)], row)
    origins = [
        start + width + BORDER + 1 for start, (_, width) in zip(starts, sizes, strict=False) for _ in range(points)
    ]
    levels = (len(sizes), points)  # R, J
    first = row * widths.view(levels) + column + lengths_as(origins, row).view(levels)
    return first, corner - cell


def _level_sizes(sizes: Sizes, places: Tensor) -> Tensor:
    """(x, y) of each place's level (R, J, 2): the last dimensions of `places`, as stretching them there is slow."""
    points = places.shape[4]
    lengths = [length for height, width in sizes for _ in range(points) for length in (width, height)]
    return lengths_as(lengths, places).view(len(sizes), points, 2)


def _corner_steps(width: int) -> list[int]:
    """From the upper left of four cells of a padded level to each of them."""
    return [0, 1, width + BORDER, width + BORDER + 1]


def _corner_cells(first: Tensor, sizes: Sizes) -> Tensor:
    """(B, Q, G, R, J) -> (B, Q, G, R, J, 4)."""
    points = first.shape[4]
    steps = [step for _, width in sizes for _ in range(points) for step in _corner_steps(width)]
    return first[..., None] + lengths_as(steps, first).view(len(sizes), points, 4)


def _corner_shares(fraction: Tensor, weights: Tensor) -> Tensor:
    """What each of the four cells has in the sum: (B, Q, G, R, J, 2), (B, Q, G, R J) -> (B, Q, G, R, J, 4)."""
    right, down = fraction.unbind(-1)
    weights = weights.view_as(right)
    lower = weights * down
    upper = weights - lower
    upper_right, lower_right = upper * right, lower * right
    return torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], -1)


def _blocks_of(padded: Tensor) -> Tensor:
    """Where images and heads start in the rows of padded values (B, G, S', D): (B, 1, G, 1, 1)."""
    batch, heads, cells = padded.shape[:3]
    return torch.arange(0, batch * heads * cells, cells, dtype=torch.int32).view(batch, 1, heads, 1, 1)


def _bags_of(first: Tensor, sizes: Sizes, padded: Tensor) -> Tensor:
    """Rows of padded values that each sum is made of: (B Q G, 4 R J)."""
    return _corner_cells(first + _blocks_of(padded), sizes).flatten(3).flatten(0, 2)


class DeformableLayer(GradientCheckpointingLayer):
    """Post-norm encoder layer with deformable attention of all levels to all levels."""

    def __init__(self, config: Any, hidden_size: int, levels: int, points: int):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = DeformableAttention(hidden_size, config.num_attention_heads, levels, points)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.mlp = FeedForward(hidden_size, config.encoder_ffn_dim, config.dropout)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, reference: Tensor, sizes: Sizes, inside: Tensor | None
    ) -> Tensor:
        """One layer: (B, S, C) -> (B, S, C).

        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, C)`): cells of all levels, one level after the other.
            positions (`torch.Tensor` of shape `(B or 1, S, C)`): added to what asks, not to what is looked at.
            reference: as of [`DeformableAttention`], as are the others.
            sizes: height and width of each level in cells.
            inside: (B, S), True where there is image; None: everywhere.
        """
        attended = self.self_attn(hidden_states + positions, hidden_states, reference, sizes, inside)
        attended = F.dropout(attended, self.dropout, self.training)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)
        update = F.dropout(self.mlp(hidden_states), self.dropout, self.training)
        return self.final_layer_norm(hidden_states + update)


def reference_points(sizes: Sizes, valid: list[Tensor] | None, like: Tensor) -> Tensor:
    """Centers of all cells, as places on every level: (B or 1, S, R, 2), (x, y) in cells.

    Args:
        sizes: height and width of each level in cells.
        like: gives device and type.
        valid: of each level the cells that are image (B, 2), rows and columns; None: all.

    Examples:
        >>> reference_points([(1, 2)], None, torch.zeros(())).tolist()
        [[[[0.5, 0.5]], [[1.5, 0.5]]]]
    """
    if valid is None:
        lengths = [lengths_as(size, like)[None] for size in sizes]
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

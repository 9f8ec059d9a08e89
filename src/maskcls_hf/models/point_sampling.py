"""Points at which masks are compared instead of all pixels (Kirillov et al., PointRend, CVPR 2020; Mask2Former,
Section 3.3).

Shape legend: see matching.py; P is here the number of points, each (x, y) in 0..1 of the padded image.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PointSampler:
    """Draws points on valid pixels, never on padding or void.

    Args:
        config: `loss_points`, `loss_oversampling` and `loss_importance` say how many.
    """

    def __init__(self, config):
        self.number = config.loss_points
        self.candidates = int(config.loss_points * config.loss_oversampling)
        self.uncertain = int(config.loss_points * config.loss_importance)
        # Beyond the border of an image its last pixel goes on; the code of the paper sees zeros there.
        self.padding_mode = "zeros" if config.attend_to_padding else "border"

    @classmethod
    def of(cls, config: Any) -> "PointSampler | None":
        """None: masks are compared at all pixels."""
        return None if config.loss_points is None else cls(config)

    def draw(self, rows: int, points: int, device: torch.device) -> Tensor:
        """Uniform random numbers in 0..1: (rows, points, 2)."""
        return torch.rand(rows, points, 2, device=device)

    def of_images(self, predictions: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """At the same points for all masks of an image: logits (B, L N, P), segments (B, M, P) in 0..1, and 1 where a
        point is on an image, 0 if that has no valid pixel (B, P).

        Args:
            predictions: [`Predictions`].
            targets: [`PaddedTargets`].
        """
        image = torch.arange(len(predictions.class_logits), device=predictions.class_logits.device)
        points = self.on_valid_pixels(image, self.number, targets)
        labels = labels_at(points, image, None, targets, self.padding_mode)
        on_image = points.new_ones(points.shape[:2]) * has_valid_pixels(targets, image)[:, None]
        return predictions.masks_at(points, self.padding_mode), labels * on_image[:, None], on_image

    def of_pairs(self, logits: Tensor, image: Tensor, segment: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Points (T, P, 2) of matched masks, most of them where the mask is the least sure, and the segments there
        (T, P) in 0..1."""
        candidates = self.on_valid_pixels(image, self.candidates, targets)  # (T, P', 2)
        certainty = logits_at(logits[:, None], candidates, self.padding_mode)[:, 0].abs()
        least = certainty.topk(self.uncertain, largest=False, sorted=False).indices  # (T, P'')
        uncertain = candidates.gather(1, least[..., None].expand(-1, -1, 2))
        points = torch.cat([uncertain, self.on_valid_pixels(image, self.number - self.uncertain, targets)], 1)
        return points, labels_at(points, image, segment, targets, self.padding_mode)

    def on_valid_pixels(self, image: Tensor, points: int, targets: Any) -> Tensor:
        """Uniformly on the valid pixels of the images (n,): (n, points, 2)."""
        drawn = self.draw(len(image), points, image.device)
        if targets.valid_mask is None:
            return drawn
        pixels, numbers = targets.valid_pixels  # (B, H W), (B,)
        height, width = targets.masks.shape[-2:]
        number = numbers[image][:, None]  # (n, 1)
        rank = (self.draw(len(image), points, image.device)[..., 0] * number).long()
        rank = rank.clamp(max=pixels.shape[1] - 1).minimum((number - 1).clamp(min=0))
        pixel = pixels.flatten()[image[:, None] * pixels.shape[1] + rank]  # (n, points)
        corner = torch.stack([pixel % width, pixel.div(width, rounding_mode="floor")], -1)
        return (corner + drawn) / drawn.new_tensor([width, height])


def has_valid_pixels(targets: Any, image: Tensor) -> Tensor:
    """Of images (n,), bool."""
    if targets.valid_mask is None:
        return torch.ones_like(image, dtype=torch.bool)
    return targets.valid_pixels[1][image] > 0


def logits_at(logits: Tensor, points: Tensor, padding_mode: str) -> Tensor:
    """Maps between their cells, bilinearly: (n, R, h, w), (n, P, 2) -> (n, R, P)."""
    grid = (2 * points - 1).to(logits.dtype)[:, :, None]
    return F.grid_sample(logits, grid, mode="bilinear", padding_mode=padding_mode, align_corners=False)[..., 0]


def labels_at(points: Tensor, image: Tensor, segment: Tensor | None, targets: Any, padding_mode: str) -> Tensor:
    """Segments between their pixels, bilinearly, in 0..1; what is not valid has no part in it.

    Args:
        points (`torch.Tensor` of shape `(n, P, 2)`): on the images.
        image (`torch.Tensor` of shape `(n,)`): of the rows of points.
        segment (`torch.Tensor` of shape `(n,)`): one of each image. None: all.

    Returns:
        (n, P), or (n, M, P).
    """
    height, width = targets.masks.shape[-2:]
    masks = targets.masks.flatten()
    if segment is None:
        numbers = torch.arange(targets.rows.shape[1], device=points.device).expand(len(image), -1)
    else:
        numbers = segment[:, None]  # (n, m)
    # (n, 1 or m), -1 beyond the last
    source = image[:, None] if targets.is_index_map else targets.rows[image[:, None], numbers]
    of_first = source.clamp(min=0)[..., None] * (height * width)  # (n, 1 or m, 1)
    place = points * points.new_tensor([width, height]) - 0.5  # (n, P, 2)
    first = place.floor()
    right, down = (place - first).unbind(-1)
    column, row = first.long().unbind(-1)
    inside = total = points.new_zeros(())
    for below, share_of_row in ((0, 1 - down), (1, down)):
        for beside, share_of_column in ((0, 1 - right), (1, right)):
            x, y = column + beside, row + below
            share = share_of_row * share_of_column  # (n, P)
            if padding_mode == "zeros":
                share = share * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
            pixel = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            if targets.valid_mask is not None:
                share = share * targets.valid_mask.flatten()[image[:, None] * (height * width) + pixel]
                total = total + share
            found = masks[of_first + pixel[:, None]]  # (n, 1 or m, P)
            is_inside = found == numbers[..., None] if targets.is_index_map else found & (source >= 0)[..., None]
            inside = inside + share[:, None] * is_inside
    if targets.valid_mask is not None:
        inside = inside / total.clamp(min=torch.finfo(total.dtype).tiny)[:, None]
    return inside if segment is None else inside[:, 0]

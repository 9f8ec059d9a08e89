"""Which query explains which ground-truth segment (sigma of paper Section 3.2): targets of a batch, costs, matchers.

A matcher is `matcher(predictions, targets) -> Assignment`. It sees all layers and images of a step at once, so that the
costs leave the device in one transfer and the assignment comes back in one. A new one is a class, made of the
configuration, and a line: `register_matcher(name, cls)`.

Shape legend: B images, L supervised decoder layers (deepest last), N queries, M segments (of the image that has most;
others are padded to it), (h, w) the grid of the mask logits, P = h * w, T matched pairs of all layers and images.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import is_scipy_available, logging

from .configuration_maskcls import MATCHERS, matching_weights
from .options import as_labels, integers
from .parallel import parallel_map
from .point_sampling import PointSampler, logits_at
from .resampling import nearest_indices
from .transformer_decoders import MaskProduct, PixelLogits, SegmentLogits

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment

logger = logging.get_logger(__name__)

FOCAL_ALPHA = 0.25  # and a gamma of 2, written as squares: both as in RetinaNet and the paper's code
# Bytes that one chunk of a computation may need with its temporaries: on a CPU they stay in a core's cache.
CPU_CHUNK = 2**23
DEVICE_CHUNK = 2**28
MIN_ROWS = 64  # of a product, which with fewer is slow


class Assignment(NamedTuple):
    """Matched pairs of all layers and images, layer by layer, each (T,) int64."""

    layer: Tensor
    image: Tensor
    query: Tensor
    segment: Tensor


class Predictions:
    """Probability-mask pairs of all supervised layers, deepest last, and what some losses look at beside them.

    Args:
        class_logits (`torch.Tensor` of shape `(B, L, N, K + 1)`): float32, "no object" last.
        masks: logits (B, L, N, h, w), of the network's own type; or L factors of them, one a layer: `mask_logits` then
            makes all masks, `matched_masks` and `masks_at` what a loss looks at alone.
        boxes (`torch.Tensor` of shape `(B, L, N, 4)`, *optional*): float32, (cx, cy, w, h) in 0..1, with a box head.
        pixels: what some losses look at of each pixel.
    """

    def __init__(
        self,
        class_logits: Tensor,
        masks: Tensor | Sequence[MaskProduct],
        boxes: Tensor | None = None,
        pixels: PixelLogits | None = None,
    ):
        self.class_logits, self.boxes, self.pixels = class_logits, boxes, pixels or PixelLogits()
        self._masks: Tensor | None = None
        self._products: Sequence[MaskProduct] = []  # G, of as many layers each: one where they share their features
        if isinstance(masks, Tensor):
            self._masks = masks
        elif all(product.features is masks[0].features for product in masks):
            embeddings = torch.cat([product.mask_embeddings for product in masks], 1)  # (B, L N, C_E)
            self._products = [MaskProduct(embeddings, masks[0].features)]
        else:
            self._products = masks

    @classmethod
    def of_layers(cls, layers: list[SegmentLogits], pixels: PixelLogits | None = None) -> "Predictions":
        classes, masks, boxes = zip(*layers, strict=True)
        joined: Any = masks
        if isinstance(masks[0], Tensor):
            joined = torch.stack(masks, 1)
            joined = joined.float() if joined.dtype == torch.float64 else joined
        return cls(
            torch.stack(classes, 1).float(),
            joined,
            None if boxes[0] is None else torch.stack(boxes, 1).float(),
            pixels,
        )

    @property
    def mask_logits(self) -> Tensor:
        """Of all queries: (B, L, N, h, w)."""
        made = self._masks
        # What was made without gradients, as matching does, is of no use to a loss.
        if made is None or (self._products and torch.is_grad_enabled() > made.requires_grad):
            made = torch.cat([product.logits() for product in self._products], 1)
            self._masks = made = made.unflatten(1, self.class_logits.shape[1:3])
        return made

    def matched_masks(self, assignment: Assignment, most: int | None = None) -> Tensor:
        """Of the matched queries: (T, h, w).

        Args:
            most: pairs of a layer that one image has at most. None: they are counted, for which the host waits.
        """
        images, layers, queries = self.class_logits.shape[:3]
        layer, image, query, _ = assignment
        if not self._products:
            return self.mask_logits.flatten(0, 2).index_select(0, (image * layers + layer) * queries + query)
        depth = layers // len(self._products)  # layers of a product
        product = layer.div(depth, rounding_mode="floor")
        # Masks of one product and image are made together, in a table with room for the most that there are of them.
        place = product * images + image  # (T,) in 0..G B-1
        is_at = place[:, None] == torch.arange(len(self._products) * images, device=place.device)  # (T, G B)
        rank = is_at.cumsum(0).gather(1, place[:, None])[:, 0] - 1
        room = depth * most if most is not None else int(place.bincount(minlength=1).max())
        row = (layer - product * depth) * queries + query
        embeddings = torch.stack([product.mask_embeddings for product in self._products])  # (G, B, depth N, C_E)
        table = embeddings.new_zeros(*embeddings.shape[:2], room, embeddings.shape[3])
        table = table.index_put((product, image, rank), embeddings[product, image, row])
        made = [of.features.mask_logits(rows) for of, rows in zip(self._products, table.unbind(), strict=True)]
        masks = torch.cat(made) if len(made) > 1 else made[0]  # (G B, room, h, w)
        return masks.flatten(0, 1).index_select(0, place * room + rank)

    def masks_at(self, points: Tensor, padding_mode: str) -> Tensor:
        """Of all queries, at points (B, P, 2) in 0..1 of each image: (B, L N, P)."""
        if not self._products:
            return logits_at(self.mask_logits.flatten(1, 2), points, padding_mode)
        found = []
        for embeddings, features in self._products:
            kind = full_dtype(embeddings.dtype)
            found.append(embeddings.to(kind) @ logits_at(features.project().to(kind), points, padding_mode))
        return torch.cat(found, 1)


# ---- targets ----


@dataclass
class PaddedTargets:
    """Ground-truth segments of a batch, as [`prepare_targets`] makes them.

    Args:
        masks: index maps (B, H, W) of integers, each pixel's segment, -1 where there is none; or the stacks of masks
            of all images one after the other (S, H, W) bool.
        class_labels (`torch.Tensor` of shape `(S,)`): int64, of all images one after the other.
        numbers: how many segments each image has; their sum is S.
        valid_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): True where a pixel counts: neither padding nor
            void. None: all do.
        image_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): height and width of each image without padding, to
            which its boxes are relative. None: (H, W).
        is_index_map: which of the two `masks` are. They cannot be told apart by their shapes.
    """

    masks: Tensor
    class_labels: Tensor
    numbers: list[int]
    valid_mask: Tensor | None = None
    image_sizes: Tensor | None = None
    is_index_map: bool = False
    _resampled: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> Tensor:
        """Where the segments of each image stand among those of all images: (B, M), -1 beyond the last."""
        table = np.full((len(self.numbers), max(self.numbers, default=0)), -1)
        table[np.arange(table.shape[1]) < np.array(self.numbers)[:, None]] = np.arange(sum(self.numbers))
        return to_device(torch.from_numpy(table), self.masks.device)

    @cached_property
    def labels(self) -> Tensor:
        """Classes (B, M); that of any segment beyond an image's last."""
        return self.class_labels[self.rows.clamp(min=0)]

    @cached_property
    def boxes(self) -> Tensor:
        """Boxes (cx, cy, w, h) around the valid pixels of each segment (B, M, 4) float32, in 0..1; zeros where there
        are none."""
        if self.is_index_map:
            corners = boxes_of_index_maps(self.masks, self.rows.shape[1], self.valid_mask)
        else:
            valid = None if self.valid_mask is None else self.valid_mask[self.image_of_row]
            corners = boxes_of_masks(self.masks, valid)[self.rows.clamp(min=0)]
        sizes = self.image_sizes
        if sizes is None:
            sizes = torch.tensor([self.masks.shape[-2:]], device="cpu")
        sizes = sizes.to(corners.device).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4)
        return to_centers((corners / sizes).float())

    @cached_property
    def image_of_row(self) -> Tensor:
        """Image of each of all segments (S,)."""
        return to_device(torch.from_numpy(np.repeat(np.arange(len(self.numbers)), self.numbers)), self.masks.device)

    @cached_property
    def valid_pixels(self) -> tuple[Tensor, Tensor]:
        """Indices of the valid pixels of each image, first those (B, H * W), and how many they are (B,)."""
        assert self.valid_mask is not None
        valid = self.valid_mask.flatten(1)
        end = valid.shape[1]
        rank = torch.where(valid, valid.cumsum(1) - 1, end)  # the others are written behind the last
        pixels = rank.new_zeros(len(valid), end + 1).scatter_(
            1, rank, torch.arange(end, device=rank.device).expand_as(rank)
        )
        return pixels[:, :-1], valid.sum(1)

    def resampled(self, size: Sequence[int], at_centers: bool = False) -> tuple[Tensor, Tensor]:
        """Masks (B, M, P) and valid pixels (B, P) at the grid of the mask logits (h, w), as bool; masks are False where
        no pixel is valid.

        Of each cell the first pixel, as in the paper's code, or the one `at_centers`, where upsampling puts the cell.
        """
        key = (*size, at_centers)
        if key not in self._resampled:
            full = self.masks.shape[-2:]
            rows, columns = (
                nearest_indices(length, cells, self.masks.device, at_centers)
                for length, cells in zip(full, size, strict=True)
            )
            masks = self.masks[:, rows[:, None], columns].flatten(1)  # (B or S, P)
            if self.is_index_map:
                segments = torch.arange(self.rows.shape[1], device=masks.device)
                masks = masks[:, None] == segments[:, None]
            else:
                masks = masks[self.rows.clamp(min=0)] & (self.rows >= 0)[:, :, None]
            if self.valid_mask is None:
                valid = masks.new_ones(len(self.numbers), masks.shape[2])
            else:
                valid = self.valid_mask[:, rows[:, None], columns].flatten(1)
                masks = masks & valid[:, None]
            self._resampled[key] = masks, valid
        return self._resampled[key]

    def masks_of(self, image: Tensor, segment: Tensor) -> Tensor:
        """Masks (n, H, W) bool at full resolution of n pairs of an image and its segment."""
        if self.is_index_map:
            return self.masks.index_select(0, image) == segment.to(self.masks.dtype).view(-1, 1, 1)
        return self.masks.index_select(0, self.rows[image, segment])


def prepare_targets(
    mask_labels: list[Tensor],
    class_labels: list[Tensor],
    num_labels: int,
    device: torch.device,
    valid_mask: Tensor | None = None,
    image_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> PaddedTargets:
    """Check the labels of B images against each other, pad them to one size, and put them on the device.

    Args: as of `MaskClsCriterion`; `valid_mask` (B, H, W) non-zero where a pixel counts.

    Raises:
        `ValueError`: labels that do not fit each other. What they hold is looked at on the CPU only.
    """
    mask_labels = [as_labels(masks, f"Image {i}: mask_labels") for i, masks in enumerate(mask_labels)]
    class_labels = [as_labels(labels, f"Image {i}: class_labels") for i, labels in enumerate(class_labels)]
    class_labels = [integers(labels, f"Image {i}: class_labels") for i, labels in enumerate(class_labels)]
    for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        check_shapes(image, masks, labels)
        if masks.ndim == 3:
            check_inside(image, masks)
    if padded_size is not None:
        check_sizes(mask_labels, padded_size, image_sizes)
    numbers = [len(labels) for labels in class_labels]
    is_index_map = all(masks.ndim == 2 for masks in mask_labels)
    mask_labels = [
        _with_room(masks, n) if masks.ndim == 2 else masks for masks, n in zip(mask_labels, numbers, strict=True)
    ]
    if not is_index_map:
        mask_labels = [
            masks if masks.ndim == 3 else masks_of_map(masks, n) for masks, n in zip(mask_labels, numbers, strict=True)
        ]
    sizes = [(masks.shape[-2], masks.shape[-1]) for masks in mask_labels]
    if valid_mask is not None:
        size = (valid_mask.shape[1], valid_mask.shape[2])
        if len(valid_mask) != len(sizes) or any(size[0] < height or size[1] < width for height, width in sizes):
            raise ValueError(
                f"pixel_mask {tuple(valid_mask.shape)} does not cover {len(sizes)} images with labels of "
                f"{sizes} pixels."
            )
        valid_mask = valid_mask.to(device) != 0
    else:
        size = padded_size or (max(height for height, _ in sizes), max(width for _, width in sizes))
    if image_sizes is None:
        image_sizes = to_device(torch.tensor(sizes), device)
    padded = [pad_to(masks, *size) for masks in mask_labels]
    masks = joined(torch.stack if is_index_map else torch.cat, padded, device)  # (B, H, W) or (S, H, W)
    labels = joined(torch.cat, class_labels, device).long()  # (S,)
    check_values(masks if is_index_map else None, labels, numbers, num_labels)
    masks, labels = to_device(masks, device), to_device(labels, device)
    if not is_index_map and masks.dtype != torch.bool:
        masks = masks != 0
    return PaddedTargets(masks, labels, numbers, valid_mask, image_sizes, is_index_map)


def joined(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], device: torch.device) -> Tensor:
    """`torch.cat` or `torch.stack` of the tensors: on the CPU if all are there, else on the device."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        tensors = [tensor.to(device) for tensor in tensors]
    return function(tensors)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The host does not wait for the device."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pad_to(masks: Tensor, height: int, width: int) -> Tensor:
    """A stack (M, h, w) or an index map (h, w) -> height x width, with no segment at the bottom and on the right."""
    bottom, right = height - masks.shape[-2], width - masks.shape[-1]
    # without padding F.pad makes a copy
    return F.pad(masks, (0, right, 0, bottom), value=0 if masks.ndim == 3 else -1) if bottom or right else masks


def _with_room(index_map: Tensor, number: int) -> Tensor:
    """In a type that has -1 and the index of each segment, also of those without a pixel."""
    values = torch.iinfo(index_map.dtype)
    return index_map if values.min < 0 and number - 1 <= values.max else index_map.int()


def masks_of_map(index_map: Tensor, number: int) -> Tensor:
    """(H, W) -> the masks of its segments (M, H, W) bool."""
    return index_map == torch.arange(number, device=index_map.device).view(-1, 1, 1)


def check_shapes(image: int, masks: Tensor, labels: Tensor) -> None:
    """Raise `ValueError` unless labels (M,) belong to a stack (M, H, W) or to an index map (H, W)."""
    if masks.ndim == 3 and labels.shape == masks.shape[:1]:
        return
    if masks.ndim != 2 or labels.ndim != 1:
        raise ValueError(
            f"{described(image, masks, labels)} must be (M, H, W) and (M,) with the same M, or a map (H, W) and (M,)."
        )
    if masks.dtype == torch.bool or masks.is_floating_point():
        raise ValueError(
            f"{described(image, masks, labels)}: a map (H, W) holds integers, the places of its segments, not "
            f"{masks.dtype}."
        )


def described(image: int, masks: Tensor, labels: Tensor) -> str:
    return f"Image {image}: mask_labels {tuple(masks.shape)} and class_labels {tuple(labels.shape)}"


def check_inside(image: int, masks: Tensor) -> None:
    """Raise `ValueError` unless masks are bool, or hold 0 and one other number (looked at on the CPU only)."""
    if masks.dtype == torch.bool or not masks.numel() or masks.device.type != "cpu":
        return
    least, most = masks.amin(), masks.amax()
    if bool(least != 0) or bool(((masks != 0) & (masks != most)).any()):
        if bool(least == most) and bool(most.isfinite()):  # every pixel of all masks is inside
            return
        values = masks.unique()[:10].tolist()
        raise ValueError(f"Image {image}: mask_labels are 0 outside and 1, 255 or True inside, but hold {values}.")


def check_sizes(mask_labels: list[Tensor], padded_size: tuple[int, int], image_sizes: Tensor | None) -> None:
    """Raise `ValueError` unless masks are as large as the network's input, or as their image without padding."""
    others = [image for image, masks in enumerate(mask_labels) if tuple(masks.shape[-2:]) != padded_size]
    own_sizes = image_sizes.tolist() if others and image_sizes is not None else None
    for image in others:
        masks = mask_labels[image]
        height, width = masks.shape[-2:]
        if own_sizes is None or [height, width] != own_sizes[image]:
            raise ValueError(
                f"Image {image}: mask_labels {tuple(masks.shape)} are {height} x {width}, but pixel_values are "
                f"{padded_size[0]} x {padded_size[1]} (height x width): they must be equal, without or with padding. A "
                "stack is (M, H, W)."
            )


def check_values(index_maps: Tensor | None, labels: Tensor, numbers: list[int], num_labels: int) -> None:
    """Raise `ValueError` for classes (S,) that are none, and for index maps (B, H, W) with segments that have no class;
    they are looked at on the CPU only."""
    if labels.device.type == "cpu" and len(labels):
        least, most = (int(value) for value in labels.aminmax())
        if not 0 <= least <= most < num_labels:
            for image, own in enumerate(labels.split(numbers)):
                if len(own) and not 0 <= own.min() <= own.max() < num_labels:
                    raise ValueError(
                        f"Image {image}: class_labels {sorted(set(own.tolist()))} must lie in 0..{num_labels - 1}."
                    )
    if index_maps is not None and index_maps.device.type == "cpu" and index_maps.numel():
        extremes = (values.tolist() for values in (index_maps.amin((1, 2)), index_maps.amax((1, 2))))
        for image, (least, most, number) in enumerate(zip(*extremes, numbers, strict=True)):
            if not -1 <= least <= most < number:
                raise ValueError(
                    f"{described(image, index_maps[image], labels[:number])}: the map holds {least}..{most}, but "
                    f"places in class_labels go from 0 to {number - 1}, and -1 is for pixels in no segment."
                )


# ---- boxes: (x0, y0, x1, y1), the corners, or (cx, cy, w, h), center and size ----


def boxes_of_masks(masks: Tensor, valid: Tensor | None = None) -> Tensor:
    """Corners of the boxes around masks (S, H, W) bool, in pixels, (S, 4) int64.

    x1 and y1 are the column and the row after the last: a pixel has a box of size 1, and the box of a full image is
    the image. A mask without pixels gets zeros.

    Args:
        valid (`torch.Tensor` of shape `(S, H, W)`, *optional*): bool; None: all pixels count.
    """
    masks = masks if valid is None else masks & valid
    return _boxes_of_ends(masks.any(2), masks.any(1))


def boxes_of_index_maps(maps: Tensor, number: int, valid: Tensor | None = None) -> Tensor:
    """The same of the segments 0..M-1 of index maps (B, H, W), of which no stacks are made: (B, M, 4) int64."""
    images, height, width = maps.shape
    segments = (maps if valid is None else maps.where(valid, -1)).long() + 1  # 0: in no segment
    image = torch.arange(images, device=maps.device)[:, None, None]
    in_row = maps.new_zeros(images, number + 1, height, dtype=torch.bool)
    in_column = maps.new_zeros(images, number + 1, width, dtype=torch.bool)
    yes = in_row.new_ones(())
    in_row.index_put_((image, segments, torch.arange(height, device=maps.device)[:, None]), yes)
    in_column.index_put_((image, segments, torch.arange(width, device=maps.device)), yes)
    return _boxes_of_ends(in_row[:, 1:], in_column[:, 1:])


def _boxes_of_ends(in_row: Tensor, in_column: Tensor) -> Tensor:
    (top, bottom), (left, right) = _ends(in_row), _ends(in_column)
    return torch.stack([left, top, right, bottom], dim=-1)


def _ends(present: Tensor) -> tuple[Tensor, Tensor]:
    """First index that is True and the one after the last, of each row (..., n) bool; 0 and 0 where none is."""
    length = present.shape[-1]
    numbers = torch.arange(1, length + 1, device=present.device)
    last = (present * numbers).amax(-1)
    first = length - (present * numbers.flip(0)).amax(-1)
    return torch.where(last > 0, first, 0), last


def has_box(boxes: Tensor) -> Tensor:
    """Whether segments have one: (..., 4), (cx, cy, w, h) -> (...), bool. What has a pixel has a width."""
    return boxes[..., 2] > 0


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1), each (..., 4)."""
    centers, sizes = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1)


def to_centers(corners: Tensor) -> Tensor:
    """(x0, y0, x1, y1) -> (cx, cy, w, h), each (..., 4)."""
    first, last = corners[..., :2], corners[..., 2:]
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def generalized_box_iou(corners: Tensor, others: Tensor) -> Tensor:
    """GIoU in -1..1 (Rezatofighi et al., CVPR 2019) of boxes (..., 4) and (..., 4), which broadcast: (M, 4) and (M, 4)
    give (M,), the pairs; (N, 1, 4) and (M, 4) give (N, M), all of them. Boxes without area have an IoU of 0."""

    def area(first: Tensor, last: Tensor) -> Tensor:
        width, height = (last - first).clamp(min=0).unbind(-1)
        return width * height

    (first, last), (other_first, other_last) = (boxes.split(2, dim=-1) for boxes in (corners, others))
    overlap = area(torch.maximum(first, other_first), torch.minimum(last, other_last))
    union = area(first, last) + area(other_first, other_last) - overlap
    hull = area(torch.minimum(first, other_first), torch.maximum(last, other_last))
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def box_distances(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and 1 - GIoU of boxes (cx, cy, w, h), which broadcast as in `generalized_box_iou` (DETR)."""
    distance = (boxes - targets).abs().sum(-1)
    return distance, 1 - generalized_box_iou(to_corners(boxes), to_corners(targets))


# ---- costs: every query with every segment of its image ----


def chunk_bytes(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def for_each_chunk(function: Callable[[Any], None], chunks: Iterable[Any], device: torch.device) -> None:
    """Chunks do not depend on each other: on a CPU several threads do them."""
    if device.type == "cpu":
        parallel_map(function, chunks)
    else:
        for chunk in chunks:
            function(chunk)


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32, but float64 of float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums_over_segments(
    function: Callable[[Tensor], Tensor], channels: int, logits: Tensor, masks: Tensor, valid: Tensor
) -> Tensor:
    """Of functions of mask logits the sums over each segment of the image, and over all its valid pixels.

    Args:
        function: logits (b, R, p) of some pixels, which it may overwrite -> (b, channels, R, p).
        logits (`torch.Tensor` of shape `(B, R, P)`): R masks an image, of any float type.
        masks (`torch.Tensor` of shape `(B, M, P)`): bool, or shares of the pixels in 0..1.
        valid (`torch.Tensor` of shape `(B, P)`): the same.

    Returns:
        (channels, B, R, M + 1), the valid pixels last.
    """
    images, rows, pixels = logits.shape
    regions = torch.cat([masks, valid[:, None]], 1)  # (B, M + 1, P)
    dtype = full_dtype(logits.dtype)
    sums = logits.new_zeros(images, channels, rows, regions.shape[1], dtype=dtype)
    # Of each value: the logit, up to two temporaries and what is made of it; of each pixel the regions too.
    values = chunk_bytes(logits.device) // (dtype.itemsize * (channels + 3))
    step_rows = min(rows, max(MIN_ROWS, values // max(pixels, 1)))
    step_pixels = max(1, min(pixels, values // (step_rows + regions.shape[1])))
    step_images = max(1, values // (step_rows * step_pixels)) if (step_rows, step_pixels) == (rows, pixels) else 1

    @torch.no_grad()
    def add_up(chunk: tuple[slice, slice]) -> None:
        image, row = chunk
        for pixel in slices(pixels, step_pixels):
            made = function(logits[image, row, pixel].to(dtype, copy=True))  # (b, channels, r, p)
            inside = regions[image, :, pixel].to(dtype)  # (b, M + 1, p)
            product = made.flatten(1, 2) @ inside.transpose(1, 2)
            sums[image, :, row] += product.unflatten(1, made.shape[1:3])

    chunks = [(image, row) for image in slices(images, step_images) for row in slices(rows, step_rows)]
    for_each_chunk(add_up, chunks, logits.device)
    return sums.transpose(0, 1)


def pairwise_losses(logits: Tensor, masks: Tensor, valid: Tensor, is_focal: bool = True) -> tuple[Tensor, Tensor]:
    """Mean focal loss (RetinaNet, Eq. 5) or cross-entropy, and dice loss (V-Net; 1 added to both parts as in the
    paper's code) of each of R masks with each of M segments of its image: (B, R, P), (B, M, P) and (B, P), bool or
    shares in 0..1 -> (B, R, M) each."""
    parts = _focal_parts if is_focal else _cross_entropy_parts
    probability, outside, inside = sums_over_segments(parts, 3, logits, masks, valid)
    pixels = valid.sum(1).clamp(min=1).view(-1, 1, 1)
    focal = (inside[..., :-1] + (outside[..., -1:] - outside[..., :-1])) / pixels
    areas = probability[..., -1:] + masks.sum(2)[:, None]
    return focal, 1 - (2 * probability[..., :-1] + 1) / (areas + 1)


def _focal_parts(logits: Tensor) -> Tensor:
    """Of each pixel p, and its focal loss outside and inside of a segment: (b, R, p) -> (b, 3, R, p)."""
    parts = logits.new_empty(len(logits), 3, *logits.shape[1:])
    probability, outside, inside = parts.unbind(1)
    torch.sigmoid(logits, out=probability)
    cross_entropy = torch.ops.aten.softplus.out(logits, out=torch.empty_like(logits))  # -log(1 - p)
    torch.mul(probability, probability, out=outside).mul_(cross_entropy).mul_(1 - FOCAL_ALPHA)
    cross_entropy.sub_(logits).mul_(FOCAL_ALPHA)  # -alpha log(p)
    torch.mul(probability, -1, out=inside).add_(1)
    inside.mul_(inside).mul_(cross_entropy)
    return parts


def _cross_entropy_parts(logits: Tensor) -> Tensor:
    """Of each pixel p, and its cross-entropy outside and inside of a segment: (b, R, p) -> (b, 3, R, p)."""
    parts = logits.new_empty(len(logits), 3, *logits.shape[1:])
    probability, outside, inside = parts.unbind(1)
    torch.sigmoid(logits, out=probability)
    torch.ops.aten.softplus.out(logits, out=outside)
    torch.sub(outside, logits, out=inside)
    return parts


def dice_coefficient(overlap: Tensor, areas: Tensor) -> Tensor:
    """2 |a and b| / (|a| + |b|) in 0..1; 0 where both are empty. Nothing is added to the parts, unlike in the losses:
    a mask beside a segment has a Dice of 0, however small they are."""
    return 2 * overlap / areas.clamp(min=torch.finfo(areas.dtype).tiny)


def pairwise_dice(logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
    """Dice (B, R, M) of each of R masks with each of M segments, shapes as in `pairwise_losses`."""
    (probability,) = sums_over_segments(lambda chunk: chunk.sigmoid_()[:, None], 1, logits, masks, valid)
    return dice_coefficient(probability[..., :-1], probability[..., -1:] + masks.sum(2)[:, None])


def class_cost(predictions: Predictions, targets: PaddedTargets) -> Tensor:
    """-p_i(c_j) (B, L, N, M)."""
    probabilities = predictions.class_logits.softmax(-1)
    labels = targets.labels[:, None, None].expand(*probabilities.shape[:3], -1)
    return -probabilities.gather(3, labels)


# ---- matchers ----


class CostsNotFinite(ValueError, FloatingPointError):
    """A matching cost is NaN or infinite."""


class BipartiteMatcher:
    """Minimal-cost one-to-one matching, cost = -p_i(c_j) and L_mask as in the loss (paper Section 3.2).

    Costs are computed in float32 at the resolution of the mask logits, with nearest-resampled targets, as in the
    paper's code, or at points (`config.loss_points`). With more segments than queries (the paper assumes N >= N^gt)
    the best N pairs are kept and a warning is given once. A matcher with other costs is a subclass with `cost_terms` of
    its own.

    Raises:
        `CostsNotFinite`: a `ValueError`; names image, layer and term.
    """

    matching = "bipartite"

    def __init__(self, config):
        if not is_scipy_available():
            raise ImportError("Bipartite matching needs scipy: pip install scipy")
        self.weights = matching_weights(config, self.matching)
        self.is_focal = config.mask_loss == "focal"
        self.sampler = PointSampler.of(config)
        self.warned = False

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: PaddedTargets) -> Assignment:
        images, layers, queries = predictions.class_logits.shape[:3]
        self.warn_about_lost_segments(targets.numbers, queries)
        terms = self.cost_terms(predictions, targets)
        costs = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(0)
        on_host = costs.cpu().numpy()  # (B, L, N, M): the one transfer of a step to the host
        pairs = []
        for layer in range(layers):
            for image, number in enumerate(targets.numbers):
                matrix = on_host[image, layer, :, :number]  # (N, M) of the image
                if not np.isfinite(matrix).all():
                    raise not_finite(terms, layer, image, number)
                query, segment = linear_sum_assignment(matrix)
                pairs.append((np.full_like(query, layer), np.full_like(query, image), query, segment))
        index = np.concatenate(pairs, axis=1) if pairs else np.zeros((4, 0))
        return Assignment(*to_device(torch.from_numpy(index.astype(np.int64, copy=False)), costs.device))

    def cost_terms(self, predictions: Predictions, targets: PaddedTargets) -> dict[str, Tensor]:
        """Unweighted costs (B, L, N, M); beyond an image's last segment they are not looked at."""
        if self.sampler is None:
            logits = predictions.mask_logits.flatten(1, 2)  # (B, L N, h, w)
            at_pixels = (logits.flatten(2), *targets.resampled(logits.shape[-2:]))
        else:
            at_pixels = self.sampler.of_images(predictions, targets)
        mask, dice = pairwise_losses(*at_pixels, self.is_focal)
        shape = (*predictions.class_logits.shape[:3], -1)
        return {"class": class_cost(predictions, targets), "mask": mask.view(shape), "dice": dice.view(shape)}

    def warn_about_lost_segments(self, numbers: list[int], num_queries: int) -> None:
        worst = max(numbers, default=0)
        if worst > num_queries and not self.warned:
            self.warned = True
            logger.warning(
                f"Image {numbers.index(worst)} of a batch has {worst} ground-truth segments but the model predicts "
                f"num_queries={num_queries}: only its {num_queries} best-matching segments are trained on. Raise "
                "num_queries or use smaller crops. This is said once."
            )


def not_finite(terms: dict[str, Tensor], layer: int, image: int, number: int) -> CostsNotFinite:
    """What to say of the costs of an image's `number` segments in a layer, one of which is NaN or infinite."""
    for name, term in terms.items():
        cost = term[image, layer, :, :number]
        bad = ~torch.isfinite(cost)
        if bad.any():
            value = "NaN" if cost.isnan().any() else "infinite"
            return CostsNotFinite(
                f"The {name} cost of image {image} in decoder layer {layer} of {term.shape[1]} is {value} for "
                f"{int(bad.sum())} of {bad.numel()} pairs: the network's logits are not finite. Lower the "
                "learning rate, clip gradients, or check the input for NaN."
            )
    return CostsNotFinite(f"The matching cost of image {image} in decoder layer {layer} overflows float32.")


class BoxMatcher(BipartiteMatcher):
    """Bipartite matching by boxes instead of masks, as DETR: cost = -p_i(c_j), the L1 distance of the boxes and
    1 - GIoU (the paper's ablation of matching).

    A segment without valid pixels has no box. It costs the same with every query, the most that a box can cost: it is
    matched by its class alone, and is the first to be left out.
    """

    matching = "box"

    def cost_terms(self, predictions: Predictions, targets: PaddedTargets) -> dict[str, Tensor]:
        if predictions.boxes is None:
            raise ValueError("matching='box' needs predicted boxes: make or load the model with matching='box'.")
        boxes = targets.boxes[:, None, None]  # (B, 1, 1, M, 4)
        distance, giou = box_distances(predictions.boxes[:, :, :, None], boxes)
        known = has_box(boxes)
        return {
            "class": class_cost(predictions, targets),
            "box": distance * known + 4 * ~known,
            "giou": giou * known + 2 * ~known,
        }


class PQMatcher(BipartiteMatcher):
    """Bipartite matching that maximizes the similarity p_i(c_j) * Dice(m_i, m_j), after recognition and segmentation
    quality, the factors of PQ (Max-DeepLab, PQ-style loss)."""

    matching = "pq"

    def __init__(self, config):
        super().__init__(config)
        self.weights = {"similarity": 1.0}

    def cost_terms(self, predictions: Predictions, targets: PaddedTargets) -> dict[str, Tensor]:
        logits = predictions.mask_logits
        resampled = targets.resampled(logits.shape[-2:], at_centers=True)
        dice = pairwise_dice(logits.flatten(3).flatten(1, 2), *resampled)
        return {"similarity": class_cost(predictions, targets) * dice.view(*logits.shape[:3], -1)}


class FixedMatcher:
    """Query k predicts class k (paper Section 3.2, fixed matching; N = K).

    Raises:
        `ValueError`: N differs from K, or an image has two segments of one class.
    """

    def __init__(self, config):
        if config.num_queries != config.num_labels:
            raise ValueError(
                f"Fixed matching gives query k to class k: num_queries={config.num_queries} must equal "
                f"num_labels={config.num_labels}. Set one to the other, or matching='bipartite'."
            )

    def __call__(self, predictions: Predictions, targets: PaddedTargets) -> Assignment:
        classes = targets.class_labels.cpu().numpy()  # (S,): the one transfer of a step to the host
        image = np.repeat(np.arange(len(targets.numbers)), targets.numbers)
        segment = np.concatenate([np.arange(number) for number in targets.numbers])
        times = Counter(zip(image.tolist(), classes.tolist(), strict=True))
        twice = sorted(key for key, number in times.items() if number > 1)
        if twice:
            first = twice[0][0]
            raise ValueError(
                f"Fixed matching takes one segment a class, but image {first} has several of class "
                f"{[label for index, label in twice if index == first]}. Use semantic targets (one segment a class), "
                "or matching='bipartite'."
            )
        layers = predictions.class_logits.shape[1]
        of_layer = np.stack([image, classes, segment])  # (3, S)
        index = np.concatenate([np.repeat(np.arange(layers), len(image))[None], np.tile(of_layer, layers)])
        return Assignment(*to_device(torch.from_numpy(index), targets.masks.device))


ONE_TO_ONE = ("bipartite", "fixed", "box", "pq")  # no segment has two queries, no query two segments
MATCHERS.register("bipartite", BipartiteMatcher)
MATCHERS.register("fixed", FixedMatcher)
MATCHERS.register("box", BoxMatcher)
MATCHERS.register("pq", PQMatcher)

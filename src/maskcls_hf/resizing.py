"""Logits of one image -> its map: upsample to the padded size, crop the padding, resize to the target.

Both resizes are bilinear with half-pixel centres (`align_corners=False`). They are done in slices of target
rows, so that a map of any size fits a memory bound; the interpolation is written out, so that a pixel gets the
same value in every slice. Sizes are (height, width).
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Size = Sequence[int] | Tensor  # (height, width); (2,)
RowSlices = Iterator[tuple[slice, Tensor]]  # which rows of the target, and the maps there (C, rows, W)


@dataclass(frozen=True)
class MapFrame:
    """The sizes that a map passes through, and the bytes that the temporaries on its way may take."""

    logits: tuple[int, int]
    padded: tuple[int, int]
    valid: tuple[int, int]  # the image; padding lies at the bottom and the right
    target: tuple[int, int]
    max_memory: int | None

    @classmethod
    def checked(
        cls, logits: Tensor, padded_size: Size, valid_size: Size, target_size: Size, max_memory: int | None
    ) -> "MapFrame":
        """Raises TypeError or ValueError for what is no size, and for an image larger than its padded size."""
        padded = _checked_size(padded_size, "padded_size")
        valid = _checked_size(valid_size, "valid_size")
        target = _checked_size(target_size, "target_size")
        if valid[0] > padded[0] or valid[1] > padded[1]:
            raise ValueError(f"valid_size {valid} does not fit into padded_size {padded}; both are (height, width)")
        if max_memory is not None and max_memory <= 0:
            raise ValueError(f"max_memory must be a positive number of bytes or None, got {max_memory}")
        return cls((logits.shape[-2], logits.shape[-1]), padded, valid, target, max_memory)

    def resized(
        self, maps: Tensor, channels: int, at_padded_size: Callable[[Tensor], Tensor] | None = None
    ) -> RowSlices:
        """`maps` (C, h, w) at the target size, slice by slice.

        `at_padded_size` maps the cropped logits to something else (C', rows, width) before the second resize.
        `channels` is how many maps are held at a time by this and by the caller.
        """
        for rows in self._row_slices(channels):
            lower, upper, _ = _taps(self.valid[0], self.target[0], rows)
            window = range(int(lower[0]), int(upper[-1]) + 1)  # the rows of the padded size that these rows need
            cropped = _interpolate(maps, 1, self.logits[0], self.padded[0], window)
            cropped = _interpolate(cropped, 2, self.logits[1], self.padded[1], range(self.valid[1]))
            if at_padded_size is not None:
                cropped = at_padded_size(cropped)
            resized = _interpolate(cropped, 1, self.valid[0], self.target[0], rows, first=window.start)
            resized = _interpolate(resized, 2, self.valid[1], self.target[1], range(self.target[1]))
            yield slice(rows.start, rows.stop), resized

    def _row_slices(self, channels: int) -> Iterator[range]:
        height, width = self.target
        step = height
        if self.max_memory is not None:
            # float32; at most three copies at the padded size, two between the sizes, four at the target size
            source_width = max(self.logits[1], self.valid[1])
            padded_row = 4 * channels * 3 * source_width
            target_row = 4 * channels * (2 * source_width + 4 * width) + padded_row * self.valid[0] / height
            step = min(height, int((self.max_memory - 2 * padded_row) / max(target_row, 1)))
        step = max(step, 1)
        return (range(start, min(start + step, height)) for start in range(0, height, step))


def _checked_size(size: Size, name: str) -> tuple[int, int]:
    try:
        values = tuple(operator.index(value) for value in size)
    except TypeError as error:
        raise TypeError(f"{name} must be (height, width), two integers, got {size!r}") from error
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{name} must be (height, width), two positive integers, got {values}")
    return values[0], values[1]


def _taps(size: int, out_size: int, positions: range) -> tuple[Tensor, Tensor, Tensor]:
    """For output positions of an axis: the two input positions and the weight of the second."""
    centres = torch.arange(positions.start, positions.stop, dtype=torch.float32) + 0.5
    source = (centres * (size / out_size) - 0.5).clamp(min=0, max=size - 1)
    lower = source.long()
    return lower, (lower + 1).clamp(max=size - 1), source - lower


def _interpolate(maps: Tensor, dim: int, size: int, out_size: int, positions: range, first: int = 0) -> Tensor:
    """`positions` of an axis resized from `size` to `out_size`; `maps` holds the axis from `first` on."""
    if size == out_size:
        return maps.narrow(dim, positions.start - first, len(positions))
    lower, upper, weight = (tap.to(maps.device) for tap in _taps(size, out_size, positions))
    if dim == 1:
        weight = weight[:, None]
    near = maps.index_select(dim, lower - first).mul_(1 - weight)
    return near.add_(maps.index_select(dim, upper - first).mul_(weight))

"""Maps of ids as runs of equal pixels: a label map has far fewer runs than pixels, so that runs are what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.integer]


def as_array(values: Tensor | NDArray | Sequence[float], dtype: type | None = None) -> NDArray:
    """An array in the computer's own memory, without a copy where that is possible."""
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values, dtype=dtype)


class Runs(NamedTuple):
    """A map as runs of equal pixels, row after row."""

    shape: tuple[int, int]  # H, W
    starts: NDArray[np.int64]  # (R,) the first pixel of each, rising from 0
    values: Ids  # (R,)

    @classmethod
    def of(cls, pixels: Ids) -> Runs:
        """Of a map (H, W)."""
        height, width = pixels.shape
        flat = pixels.reshape(-1)
        is_first = np.empty(flat.size, dtype=np.bool_)
        is_first[:1] = True
        np.not_equal(flat[1:], flat[:-1], out=is_first[1:])
        starts = _places_of_few(is_first)
        return cls((height, width), starts, flat[starts])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Pixels of each (R,)."""
        return _lengths(self.starts, self.shape)

    def numbered(self) -> tuple[Ids, Runs]:
        """The values, rising (I,), and the map of their places among these."""
        values = np.unique(self.values)
        return values, self._replace(values=np.searchsorted(values, self.values))

    def look_up(self, table: NDArray) -> Runs:
        """Each value, a place in a table, becomes what stands there."""
        return self._replace(values=table[self.values])

    def map(self) -> NDArray:
        """(H, W)."""
        return np.repeat(self.values, self.lengths).reshape(self.shape)


def overlay(first: Runs, second: Runs) -> tuple[Ids, Ids, NDArray[np.int64]]:
    """Two maps of one size as pieces of runs in which neither changes.

    Returns:
        The values of both in each piece, and its pixels: (P,) each.
    """
    starts = np.concatenate([first.starts, second.starts])
    order = np.argsort(starts, kind="stable")  # which merges sorted stretches
    of_first = np.cumsum(order < len(first.starts)) - 1
    of_second = np.arange(len(order)) - of_first - 1
    pixels = _lengths(starts[order], first.shape)
    pieces = np.flatnonzero(pixels)  # none where both change at once: the next one has the pixels
    return first.values[of_first[pieces]], second.values[of_second[pieces]], pixels[pieces]


def _lengths(starts: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.int64]:
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = math.prod(shape) - starts[-1:]
    return lengths


def _places_of_few(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """np.flatnonzero, faster where few flags are True.

    Below one True flag in ten np.flatnonzero jumps from one to the next, which a processor cannot foresee; here it
    looks at bytes of eight flags first, of which more than a tenth have one, then at the flags of these.
    """
    packed = np.packbits(flags)
    of_bytes = np.flatnonzero(packed != 0)
    inside = np.flatnonzero(np.unpackbits(packed[of_bytes]).view(np.bool_))
    return (of_bytes[inside >> 3] << 3) + (inside & 7)


def places_in(ids: Ids, known: Sequence[int]) -> NDArray[np.int64]:
    """Place of each id in `known` (R,), which may have any order; `len(known)` where it is not there."""
    order = np.argsort(known)
    ordered = np.array([*known, 0], dtype=np.int64)[[*order, -1]]  # one more, for ids above all known ones
    found = np.searchsorted(ordered[:-1], ids)
    places = np.append(order, len(known))[found]
    places[ordered[found] != ids] = len(known)
    return places


def count(keys: Ids, pixels: NDArray[np.int64], number: int) -> NDArray[np.float64]:
    """Pixels of each key 0..number-1 (number,); float64, which is exact below 2^53."""
    return np.bincount(keys, weights=pixels, minlength=number).astype(np.float64, copy=False)

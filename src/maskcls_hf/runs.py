"""Maps of ids as runs of equal pixels: a label map has far fewer runs than pixels, so that runs are what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.integer]


def as_array(values: Tensor | NDArray | Sequence[float], dtype: type | None = None) -> NDArray:
    """An array in the computer's own memory, without a copy where that is possible."""
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values, dtype=dtype)


def runs_of(*maps: Ids) -> tuple[tuple[Ids, ...], NDArray[np.int64]]:
    """Runs of pixels, row after row, in which no map changes.

    Args:
        maps: (H, W) each.

    Returns:
        The value of every map in each run (R,), and the pixels of each run (R,).
    """
    flat = [ids.reshape(-1) for ids in maps]
    size = flat[0].size
    if size == 0:
        return tuple(flat), np.zeros(0, dtype=np.int64)
    is_first = np.empty(size, dtype=np.bool_)
    is_first[0] = True
    changes = is_first[1:]
    np.not_equal(flat[0][1:], flat[0][:-1], out=changes)
    for ids in flat[1:]:
        np.logical_or(changes, ids[1:] != ids[:-1], out=changes)
    starts = _places_of_few(is_first)
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1] = size - starts[-1]
    return tuple(ids[starts] for ids in flat), lengths


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

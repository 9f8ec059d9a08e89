"""Outlines of masks along the edges of their pixels."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.run_lengths import MaskRuns

Ring = list[tuple[int, int]]  # corners (x, y), at whole numbers


def outlines(mask: MaskRuns) -> list[Ring]:
    """Rings around the parts of a mask and around its holes, without corners on a straight line.

    Filled by the rule of even and odd, they are the mask. Parts that touch at a corner alone are two.
    """
    if not mask.area:
        return []
    (rows, columns), inside = mask.window()
    height, width = inside.shape
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}  # edges from each corner, with the mask on their right

    def is_in(x: int, y: int) -> bool:
        return 0 <= x < width and 0 <= y < height and bool(inside[y, x])

    for y, x in zip(*(places.tolist() for places in inside.nonzero()), strict=True):
        for start, end, beside in (
            ((x, y), (x + 1, y), (x, y - 1)),
            ((x + 1, y), (x + 1, y + 1), (x + 1, y)),
            ((x + 1, y + 1), (x, y + 1), (x, y + 1)),
            ((x, y + 1), (x, y), (x - 1, y)),
        ):
            if not is_in(*beside):
                steps.setdefault(start, []).append(end)
    rings = []
    while steps:
        first = next(iter(steps))
        ring, corner, before = [], first, (0, 0)
        while True:
            ends = steps[corner]
            # where two parts touch, turn right: stay at the same one
            end = max(ends, key=lambda end: _turn(before, (end[0] - corner[0], end[1] - corner[1])))
            ends.remove(end)
            if not ends:
                del steps[corner]
            ring.append(corner)
            before, corner = (end[0] - corner[0], end[1] - corner[1]), end
            if corner == first:
                break
        rings.append([(x + columns.start, y + rows.start) for x, y in _corners(ring)])
    return rings


def _turn(before: tuple[int, int], after: tuple[int, int]) -> int:
    return before[0] * after[1] - before[1] * after[0]


def _corners(ring: Ring) -> Ring:
    pairs = zip(ring[-1:] + ring[:-1], ring, ring[1:] + ring[:1], strict=True)
    return [b for a, b, c in pairs if _turn((b[0] - a[0], b[1] - a[1]), (c[0] - b[0], c[1] - b[1]))]


def joined(rings: Sequence[Ring]) -> Ring:
    """All rings as one, with bridges of no width there and back."""
    path: Ring = []
    for ring in rings:
        path += [*ring, ring[0]]
    return path + [ring[0] for ring in reversed(rings[:-1])]

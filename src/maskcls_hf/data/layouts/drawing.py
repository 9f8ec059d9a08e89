"""Shapes of annotation tools as masks: polygons, boxes, ellipses, run lengths and bitmaps.

Each `draw_` function takes the size (height, width) of the image last; what lies outside of the image is cut off.
Edges of pixels lie at whole numbers, but for `draw_pixel_polygon`.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from ...models.run_lengths import MaskRuns, rle_counts
from ..files import decoded, shown

Size = tuple[int, int]
RunLengths = dict[str, Any]  # as pycocotools: `size` [height, width] and `counts`, bytes

ELLIPSE_CORNERS = 180
# Faults beyond these would take pycocotools much memory: 100 bytes for each pixel on the outline of a polygon.
_FARTHEST = 1e5  # pixels; of a polygon's points
_LONGEST = 1e5  # pixels; of a polygon's outline, more on images of more than four times as many
PARTS = 64  # polygons that are merged at once


def flat(points: Any, fewest: int = 3) -> list[float]:
    """[[x, y], ...] -> [x, y, ...]. ValueError: they are no points, or fewer than `fewest`."""
    try:
        found = np.array(points, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 2 or found.shape[1] != 2 or len(found) < fewest or not np.isfinite(found).all():
        raise ValueError(f"needs {fewest} points [x, y] or more, got {shown(points)}")
    return found.ravel().tolist()


def box_points(left: float, top: float, right: float, bottom: float) -> list[float]:
    """Corners of a box."""
    return [left, top, right, top, right, bottom, left, bottom]


def turned(points: Sequence[float], degrees: float, center: tuple[float, float]) -> list[float]:
    """Points (x, y, ...), clockwise about a center."""
    angle = math.radians(degrees)
    offsets = np.reshape(points, (-1, 2)) - center
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    found: list[float] = (offsets @ rotation + center).ravel().tolist()
    return found


def ellipse_points(x: float, y: float, x_radius: float, y_radius: float, degrees: float = 0) -> list[float]:
    """A polygon around the center (x, y), turned clockwise."""
    angles = np.arange(ELLIPSE_CORNERS) * (2 * math.pi / ELLIPSE_CORNERS)
    points = np.stack([x + x_radius * np.cos(angles), y + y_radius * np.sin(angles)], axis=1)
    return turned(points.ravel().tolist(), degrees, (x, y))


def run_lengths(segmentation: Any, size: tuple[int, int], where: str) -> RunLengths:
    """The `segmentation` of an annotation -> compressed run lengths.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, or run lengths, compressed or not.
        size: (height, width) of the image.
        where: it stands, for messages.

    Returns:
        `size` and `counts` (bytes), as pycocotools has them.

    Raises:
        ValueError: no polygon, a polygon with too few or impossible points, run lengths of another size.

    Examples:
        >>> square = run_lengths([[1, 1, 3, 1, 3, 3, 1, 3]], (4, 6), "annotation 7")
        >>> square["size"], int(coco_mask.area(square))
        ([4, 6], 4)
    """
    height, width = size
    if isinstance(segmentation, dict):
        return _checked_run_lengths(segmentation, size, where)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{where} has no segmentation (a box only?), got {shown(segmentation)}.")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where}: a polygon is a list [x1, y1, x2, y2, x3, y3, ...] of three points or more, "
                f"got {shown(polygon)}."
            )
        if not all(type(number) in (int, float) and abs(number) < _FARTHEST for number in polygon):  # NaN neither
            raise ValueError(
                f"{where}: a polygon has points that are no numbers or far outside the image of {width} x {height}."
            )
    _check_length(segmentation, size, where)
    parts = coco_mask.frPyObjects(segmentation, height, width)
    while len(parts) > PARTS:  # one merge of all goes over what it has once for each part
        parts = [coco_mask.merge(parts[start : start + PARTS]) for start in range(0, len(parts), PARTS)]
    merged: RunLengths = coco_mask.merge(parts)
    return merged


def _check_length(polygons: list[list[float]], size: tuple[int, int], where: str) -> None:
    """ValueError where polygons are far longer than the outlines of anything in an image of `size`."""
    height, width = size
    longest, longest_of_all = max(_LONGEST, height * width / 4), max(10 * _LONGEST, 2 * height * width)
    lengths = [(max(polygon) - min(polygon)) * len(polygon) / 2 for polygon in polygons]  # at most, and quick to see
    if max(lengths) <= longest and sum(lengths) <= longest_of_all:
        return
    lengths = [_length(polygon) for polygon in polygons]
    if max(lengths) > longest or sum(lengths) > longest_of_all:
        raise ValueError(
            f"{where}: {len(polygons)} polygons with {sum(map(len, polygons)) // 2} points have outlines of "
            f"{sum(lengths):.0f} pixels, too much for an image of {width} x {height}."
        )


def _length(polygon: list[float]) -> float:
    """Pixels on the outline."""
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _checked_run_lengths(segmentation: RunLengths, size: tuple[int, int], where: str) -> RunLengths:
    own_size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(own_size, (list, tuple)) or tuple(own_size) != size:
        swapped = ", so it is [width, height]" if own_size == [size[1], size[0]] else ""
        raise ValueError(
            f"{where}: run lengths of size {shown(own_size)}, the image is {list(size)} (height, width){swapped}."
        )
    pixels = size[0] * size[1]
    if isinstance(counts, list):
        if not all(type(count) is int or type(count) is float and count.is_integer() for count in counts):
            raise ValueError(f"{where}: run lengths have counts that are no whole numbers: {shown(counts)}.")
        if min(counts, default=0) < 0 or sum(counts) != pixels:
            negative = ", some negative" if min(counts, default=0) < 0 else ""
            raise ValueError(
                f"{where}: run lengths cover {shown(sum(counts))} pixels{negative}, the image has {pixels}."
            )
        compressed: RunLengths = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
        return compressed
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"{where}: run lengths without counts: {shown(segmentation)}.")
    try:
        covered = int(rle_counts(counts).sum())
    except ValueError:
        raise ValueError(f"{where}: counts are not COCO's compressed run lengths: {shown(counts)}.") from None
    if covered != pixels:
        raise ValueError(f"{where}: run lengths cover {covered} pixels, the image has {pixels}.")
    return {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else counts}


def draw_polygon(points: list[float], size: Size) -> MaskRuns:
    """One ring [x, y, ...] in pixels, as pycocotools fills it."""
    return MaskRuns.of_rle(run_lengths([points], size, "polygon"))


def draw_relative(points: list[float], size: Size) -> MaskRuns:
    """One ring in parts of the width and the height of the image."""
    scaled = np.reshape(points, (-1, 2)) * (size[1], size[0])
    return draw_polygon(scaled.ravel().tolist(), size)


def draw_pixel_polygon(outer: Any, inner: Sequence[Any], size: Size) -> MaskRuns:
    """Rings [[x, y], ...] of pixels, which are inside with their border; holes are cut out with theirs."""
    image = Image.new("1", (size[1], size[0]))
    for value, ring in ((1, outer), *((0, hole) for hole in inner)):
        ImageDraw.Draw(image).polygon([round(number) for number in flat(ring)], fill=value, outline=value)
    return MaskRuns.of_masks(np.asarray(image)[None])[0]


def draw_array(mask: NDArray[np.bool_], left: int, top: int, size: Size) -> MaskRuns:
    """A mask (h, w) whose first pixel is at (left, top) of the image."""
    mask = mask[max(0, -top) : max(0, size[0] - top), max(0, -left) : max(0, size[1] - left)]
    if not mask.size:
        return MaskRuns.of_masks(np.zeros((1, *size), dtype=bool))[0]
    return MaskRuns.of_masks(mask[None], size, max(0, top), max(0, left))[0]


def draw_rows(counts: Sequence[int], left: int, top: int, width: int, height: int, size: Size) -> MaskRuns:
    """Lengths of runs of zeros and ones in turn, zeros first, row after row of a box."""
    if min(counts, default=0) < 0 or sum(counts) != width * height:
        raise ValueError(f"run lengths cover {sum(counts)} pixels, their box {width} x {height} has {width * height}")
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
    return draw_array(pixels, left, top, size)


def draw_png(data: bytes, left: int, top: int, alpha: bool, size: Size) -> MaskRuns:
    """An encoded image whose first pixel is at (left, top); see [`inside`]."""
    return draw_array(inside(data, alpha, "the bitmap"), left, top, size)


def draw_file(path: Path, size: Size) -> MaskRuns:
    """A binary mask of the size of the image. ValueError: of another size."""
    mask = inside(path, False, str(path))
    if mask.shape != size:
        raise ValueError(
            f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels (width x height), its image {size[1]} x {size[0]}."
        )
    return draw_array(mask, 0, 0, size)


def inside(source: bytes | Path, alpha: bool, where: str) -> NDArray[np.bool_]:
    """Pixels (h, w) of a binary mask, whose values are 0 and another, or gray at the border: from the half on.

    Args:
        source: the file, or its content.
        alpha: the mask is where the image, if it can be transparent, is not.
        where: the image stands, for messages.
    """
    image: Any = decoded(source, where)
    can_hide = "A" in image.getbands() or "transparency" in image.info
    if alpha and can_hide:
        return np.asarray(image.convert("RGBA"))[..., 3] > 0
    values = np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB"))
    values = values if values.ndim == 2 else values.max(axis=-1)
    return values > values.max(initial=0) / 2 if values.dtype != np.bool_ else values


def unpacked(text: Any, zipped: bool = False) -> bytes:
    """Base64, also as a data URL -> bytes. ValueError: it is none."""
    try:
        data = base64.b64decode(str(text).rpartition("base64,")[2], validate=False)
        return zlib.decompress(data) if zipped else data
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError(f"no base64 of an image: {error}") from error


def draw_brush(packed: Sequence[int], own_size: Size, size: Size) -> MaskRuns:
    """Label Studio's brush: alpha, the last of four channels, row after row, in its own bit stream."""
    values = brush_values(packed)
    if own_size != size or len(values) != 4 * size[0] * size[1]:
        raise ValueError(
            f"the brush has {len(values)} values of an image of {own_size[1]} x {own_size[0]}, the image is "
            f"{size[1]} x {size[0]}"
        )
    return draw_array(values.reshape(*size, 4)[..., 3] > 0, 0, 0, size)


def brush_values(packed: Sequence[int]) -> NDArray[np.uint8]:
    """Values of the bit stream of thi.ng's rle-pack.

    32 bits number of values, 5 bits size of a value, four times 4 bits sizes of lengths; then runs of one value (bit 1)
    or single values (bit 0), with 2 bits for which size its length has. ValueError: it is no such stream.
    """
    try:
        bits = np.unpackbits(np.array(packed, dtype=np.uint8))
        place = 0

        def number(width: int) -> int:
            nonlocal place
            if place + width > len(bits):
                raise ValueError("it ends early")
            place += width
            return int.from_bytes(np.packbits(np.pad(bits[place - width : place], (-width % 8, 0))).tobytes(), "big")

        count, word = number(32), number(5) + 1
        sizes = [number(4) + 1 for _ in range(4)]
        if word != 8 or count > 2**31:
            raise ValueError(f"{count} values of {word} bits")
        parts, done = [], 0
        while done < count:
            is_run, length = number(1), number(sizes[number(2)]) + 1
            if is_run:
                parts.append(np.full(length, number(8), dtype=np.uint8))
            else:
                parts.append(np.packbits(bits[place : place + 8 * length]))
                place += 8 * length
            done += length
        values = np.concatenate([np.zeros(0, dtype=np.uint8), *parts])
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"no run lengths of Label Studio: {error}") from error
    if len(values) != count:
        raise ValueError(f"no run lengths of Label Studio: {len(values)} values of {count}")
    return values


def png_bytes(mask: NDArray[np.bool_]) -> bytes:
    """A mask as PNG of one bit a pixel."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()

"""Pictures for people: segments drawn over the image, with a legend."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..utils.plain_text import printable

Color = tuple[int, int, int]

SMALLEST_EDGE = 640  # smaller pictures are enlarged, so that outlines do not hide small segments
LONGEST_NAME = 60  # characters
PALETTE = 4096  # ids that are looked up without sorting the pixels
ROWS = 32  # of a picture that are blended at once
FILL, TEXT, PAPER = 0.45, (40, 40, 46), (255, 255, 255)


def distinct_colors() -> Iterator[Color]:
    """Endlessly many colors, no two equal, none black; neighbors in the sequence look different."""
    seen: set[Color] = {(0, 0, 0)}
    index = 0
    while True:
        hue = (0.58 + index * (math.sqrt(5) - 1) / 2) % 1  # steps of the golden ratio spread evenly over the circle
        saturation, value = ((0.80, 0.95), (0.55, 1.0), (0.95, 0.70))[index // 8 % 3]
        red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
        while (red, green, blue) in seen:
            blue = (blue + 1) % 256
        seen.add((red, green, blue))
        yield red, green, blue
        index += 1


def segment_colors(segments: Sequence[dict[str, Any]], num_labels: int, one_per_class: Iterable[int]) -> list[Color]:
    """A color for each segment: that of its class, the same in all images, for `one_per_class`; else its own.

    Args:
        segments: records with `label_id`.
        num_labels: K.
        one_per_class: ids of classes.

    Returns:
        Red, green and blue in 0..255 of each segment.

    Examples:
        >>> segments = [{"label_id": 0}, {"label_id": 1}, {"label_id": 1}]
        >>> colors = segment_colors(segments, num_labels=2, one_per_class=[0])
        >>> len(set(colors))
        3
    """
    colors = distinct_colors()
    of_class = [next(colors) for _ in range(num_labels)]
    shared = set(one_per_class)
    return [of_class[s["label_id"]] if s["label_id"] in shared else next(colors) for s in segments]


def color_map(ids: NDArray[Any], segments: Sequence[dict[str, Any]], colors: Sequence[Color]) -> NDArray[np.uint8]:
    """Ids (H, W) of `segments` -> (H, W, 3), black where there is no segment.

    Args:
        ids: the id of the segment at each pixel.
        segments: records with `id`.
        colors: one for each segment.
    """
    index, numbers = _small_index(ids)
    of_id = {segment["id"]: color for segment, color in zip(segments, colors, strict=True)}
    palette = np.array([of_id.get(number, (0, 0, 0)) for number in numbers], dtype=np.uint8)
    colored: NDArray[np.uint8] = palette[index]
    return colored


def _small_index(ids: NDArray[Any]) -> tuple[NDArray[Any], list[int]]:
    """A map of ids (H, W) as places in a list of numbers, which holds all of its ids."""
    low, high = (int(bound) for bound in (ids.min(), ids.max()))
    if high - low < PALETTE:
        return (ids - low).astype(np.uint16), list(range(low, high + 1))
    numbers, index = np.unique(ids, return_inverse=True)
    return index.reshape(ids.shape), numbers.tolist()


def outlines(ids: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """True at pixels of `ids` (H, W) within `width` pixels of another id."""
    edges = np.zeros(ids.shape, dtype=bool)
    for step in range(1, width + 1):
        vertical, horizontal = ids[step:] != ids[:-step], ids[:, step:] != ids[:, :-step]
        edges[step:] |= vertical
        edges[:-step] |= vertical
        edges[:, step:] |= horizontal
        edges[:, :-step] |= horizontal
    return edges


class LegendRow(NamedTuple):
    """A line of a legend: its text, and the colors of its swatch."""

    text: str
    colors: list[Color]


def _legend_rows(segments: Sequence[dict[str, Any]], colors: Sequence[Color], names: dict[int, str]) -> list[LegendRow]:
    """One row a class, largest area first, with the number of its segments where there are several."""
    area: dict[int, int] = {}
    found: dict[int, list[Color]] = {}
    for segment, color in zip(segments, colors, strict=True):
        label = segment["label_id"]
        area[label] = area.get(label, 0) + segment["area"]
        found.setdefault(label, []).append(color)
    rows = []
    for label in sorted(found, key=lambda label: -area[label]):
        count, name = len(found[label]), shortened(names[label])
        rows.append(LegendRow(f"{name} ({count})" if count > 1 else name, found[label]))
    return rows


def shortened(name: str) -> str:
    """A name on one line that is no wider than a picture should become.

    Examples:
        >>> shortened("nucleus")
        'nucleus'
    """
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def draw_overlay(
    image: NDArray[np.uint8],
    ids: NDArray[Any],
    segments: Sequence[dict[str, Any]],
    colors: Sequence[Color],
    names: dict[int, str],
    legend: bool = True,
) -> Image.Image:
    """`image` (H, W, 3) with its `segments` filled and outlined, small images enlarged; on the right the legend.

    Args:
        image: of the same size as `ids`.
        legend: whether there is one.
        ids: (H, W), the id of the segment at each pixel; ids that no segment has stay as they are.
        segments: records with `id`, `label_id`, `area`.
        colors: one for each segment.
        names: label_id -> name. Segments of a class "background" are not drawn: they would veil the image.

    Examples:
        >>> ids, segments = np.array([[1, 1], [0, 0]]), [{"id": 1, "label_id": 0, "area": 2}]
        >>> colors = segment_colors(segments, 1, ())
        >>> draw_overlay(np.zeros((2, 2, 3), np.uint8), ids, segments, colors, {0: "nucleus"}, legend=False).size
        (640, 640)
    """
    shown = [names[segment["label_id"]].lower() != "background" for segment in segments]
    segments, colors = list(compress(segments, shown)), list(compress(colors, shown))
    factor = max(1, math.ceil(SMALLEST_EDGE / max(ids.shape)))
    size = (ids.shape[1] * factor, ids.shape[0] * factor)
    pixels = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))  # (H, W, 3)
    index, numbers = _small_index(ids)
    index = index.repeat(factor, 0).repeat(factor, 1) if factor > 1 else index
    of_id = {segment["id"]: color for segment, color in zip(segments, colors, strict=True)}
    palette = np.array([of_id.get(number, (0, 0, 0)) for number in numbers], dtype=np.float32)
    opacity = np.array([FILL * (number in of_id) for number in numbers])
    edges = outlines(index, max(2, round(max(size) / 600)))
    for top in range(0, len(pixels), ROWS):
        rows = slice(top, top + ROWS)
        alpha = opacity[index[rows]]
        alpha[edges[rows] & (alpha > 0)] = 1.0
        mixed = pixels[rows] * (1 - alpha[..., None]) + palette[index[rows]] * alpha[..., None]
        pixels[rows] = mixed.round()
    blended = Image.fromarray(pixels)
    return beside(blended, _legend_rows(segments, colors, names)) if legend and segments else blended


def beside(picture: Image.Image, rows: list[LegendRow]) -> Image.Image:
    """`picture` with a legend at its right; rows that do not fit are counted in the last line."""
    text_size = max(13, min(22, max(picture.size) // 45))
    font = ImageFont.load_default(text_size)
    line, swatch, margin = round(text_size * 1.7), text_size, text_size
    fitting = max(1, (picture.height - 2 * margin) // line)
    if len(rows) > fitting:
        rows = [*rows[: fitting - 1], LegendRow(f"and {len(rows) - fitting + 1} more", [])]
    width = 3 * margin + swatch + round(max(font.getlength(row.text) for row in rows))
    sheet = Image.new("RGB", (picture.width + width, picture.height), PAPER)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    left = picture.width + margin
    for index, row in enumerate(rows):
        top = margin + index * line
        _draw_swatch(draw, row.colors, (left, top, swatch))
        draw.text((left + swatch + margin * 0.7, top + swatch / 2), row.text, fill=TEXT, font=font, anchor="lm")
    return sheet


def _draw_swatch(draw: ImageDraw.ImageDraw, colors: list[Color], square: tuple[int, int, int]) -> None:
    """A square (left, top, edge), in stripes where a class has several colors."""
    left, top, edge = square
    shown = colors[:4]
    for index, color in enumerate(shown):
        start, end = (round(edge * part / len(shown)) for part in (index, index + 1))
        draw.rectangle((left + start, top, left + end - 1, top + edge - 1), fill=color)

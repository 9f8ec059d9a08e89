"""Pictures of one image's annotation, segments and errors, side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..metrics import Segments
from ..visual.drawing import Color, LegendRow, beside, draw_overlay, segment_colors, shortened

PANEL = 420  # pixels of the longer edge of a panel
GAP = 8
CASE = "image, annotation, what the model finds"
MAPS = "what the model finds, and in red where its class is wrong (white: not annotated)"
UNLABELED = -1
WRONG, RIGHT, UNKNOWN = (np.array(c, dtype=np.uint8) for c in ((214, 39, 40), (225, 225, 225), (255, 255, 255)))


def draw_maps(
    image: NDArray[np.uint8], true: Segments, predicted: Segments, names: dict[int, str], one_color: list[int]
) -> Image.Image:
    """The predicted map on white beside its errors, with a legend; of the image (H, W, 3) only the size is used.

    Args:
        image: (H, W, 3).
        true: the annotation.
        predicted: what the model finds.
        names: of the classes by their ids.
        one_color: classes of which all segments have the same color.
    """
    of_truth, of_prediction = (found.semantic_map(UNLABELED).numpy() for found in (true, predicted))
    judged = np.where((of_truth == of_prediction)[..., None], RIGHT, WRONG)
    errors = Image.fromarray(np.where((of_truth >= 0)[..., None], judged, UNKNOWN))
    colors: list[Color] = segment_colors(predicted.records, len(names), one_color)
    found = draw_overlay(
        np.full_like(image, 255), predicted.index_map.numpy(), predicted.records, colors, names, legend=False
    )
    return _in_a_row([found, errors], names, [(predicted, colors)])


def draw_case(
    image: NDArray[np.uint8], true: Segments, predicted: Segments, names: dict[int, str], one_color: list[int]
) -> Image.Image:
    """Image (H, W, 3), its annotation and the prediction side by side, with a legend; both in the same colors.

    Args:
        image: (H, W, 3).
        true: the annotation.
        predicted: what the model finds.
        names: of the classes by their ids.
        one_color: classes of which all segments have the same color.
    """
    colored = [(found, segment_colors(found.records, len(names), one_color)) for found in (true, predicted)]
    overlays = [
        draw_overlay(image, found.index_map.numpy(), found.records, c, names, legend=False) for found, c in colored
    ]
    return _in_a_row([Image.fromarray(image), *overlays], names, colored)


def _in_a_row(
    panels: list[Image.Image], names: dict[int, str], colored: list[tuple[Segments, list[Color]]]
) -> Image.Image:
    """Panels of one shape side by side, with the legend of the segments that are drawn in them."""
    legend: dict[str, list[Color]] = {}
    for found, colors in colored:
        for segment, color in zip(found.records, colors, strict=True):
            name = names[segment["label_id"]]
            if name.lower() != "background":  # which is not drawn
                legend.setdefault(name, []).append(color)
    factor = PANEL / max(panels[0].size)
    size = (max(1, round(panels[0].width * factor)), max(1, round(panels[0].height * factor)))
    panels = [panel.resize(size, Image.Resampling.LANCZOS) for panel in panels]
    if legend:
        rows = [LegendRow(shortened(name), list(dict.fromkeys(colors))) for name, colors in legend.items()]
        panels[-1] = beside(panels[-1], rows)
    sheet = Image.new("RGB", ((len(panels) - 1) * (size[0] + GAP) + panels[-1].width, size[1]), "white")
    for place, panel in enumerate(panels):
        sheet.paste(panel, (place * (size[0] + GAP), 0))
    return sheet


def true_segments(truth: Segments) -> Segments:
    """The annotated segments but for crowds; where they overlap, the smaller is in front."""
    segments = truth.select([place for place in truth.visible if not truth.is_crowd[place]])
    return segments.drawn(sorted(range(len(segments)), key=lambda place: -segments.mask_runs[place].area))


def true_classes(truth: Segments, void_id: int) -> Segments:
    """The annotation as a map of classes, each a segment."""
    return Segments.from_class_map(truth.semantic_map(void_id), void_id)


def pixels_of(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) on the 0..255 scale -> (H, W, 3)."""
    return image.as_subclass(Tensor).clamp(0, 255).round().byte().permute(1, 2, 0).contiguous().numpy()

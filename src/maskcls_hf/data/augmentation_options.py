"""Options of `TrainTransform`: which belong together, and what a mirror exchanges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

NEEDED = object()  # an option without default
_CROP = {"crop_size": None, "single_category_limit": 1.0}
_JITTERED_CROP = {"crop_size": NEEDED, "single_category_limit": 1.0, "scale": (0.5, 2.0)}
_SHORTEST_EDGE = {"short_edges": NEEDED, "longest_edge": None}
# Way of resizing -> the options that it reads, with their defaults.
RESIZE_OPTIONS: dict[str | None, dict[str, Any]] = {
    "crop_first": _JITTERED_CROP,
    "large_scale_jitter": _JITTERED_CROP,
    "shortest_edge": {**_SHORTEST_EDGE, **_CROP},
    "detr": {**_SHORTEST_EDGE, "first_short_edges": (400, 500, 600), "crop_range": (384, 600)},
    None: _CROP,
}
_MEANINGS = {
    "crop_size": "needs pixels, one number or [height, width]",
    "scale": "needs [low, high] with 0 < low <= high",
    "short_edges": "needs a list of lengths in pixels",
    "longest_edge": "needs a length in pixels",
    "first_short_edges": "needs a list of lengths in pixels",
    "crop_range": "needs [low, high] in pixels with 1 <= low <= high",
    "single_category_limit": "needs a share above 0, at most 1",
}


def class_swaps(table: Mapping[int | str, int | str], id2label: Mapping[int, str] | None = None) -> dict[int, int]:
    """Class -> the class that takes its place in a mirrored image, in both directions.

    Raises:
        ValueError: a class that is not there, whose name several have, that is swapped with itself or with two.
    """
    swaps: dict[int, int] = {}
    for pair in table.items():
        first, second = (_class_id(label, id2label) for label in pair)
        if first == second:
            raise ValueError(f"swap_on_flip swaps class {pair[0]!r} with itself.")
        for label, other in ((first, second), (second, first)):
            if swaps.setdefault(label, other) != other:
                raise ValueError(f"swap_on_flip swaps class {label} with two others, {swaps[label]} and {other}.")
    return swaps


def _class_id(label: int | str, id2label: Mapping[int, str] | None) -> int:
    if isinstance(label, int) and (id2label is None or label in id2label):
        return label
    if id2label is None:
        raise ValueError(f"swap_on_flip names class {label!r}: names need id2label, the names of all classes.")
    ids = [place for place, name in id2label.items() if name == label]
    if len(ids) != 1:
        raise ValueError(
            f"swap_on_flip: {len(ids) or 'no'} classes are called {label!r}. There are: "
            f"{', '.join(f'{place} {name}' for place, name in id2label.items())}."
        )
    return ids[0]


def warn_of_sides(id2label: Mapping[int, str]) -> None:
    names = {name.lower() for name in id2label.values()}
    sided = sorted(name for name in names if "left" in name and name.replace("left", "right") in names)
    if sided:
        logger.warning(
            f"Images are mirrored, but classes have sides: {', '.join(sided)}. Say what a mirror exchanges, as in "
            f"swap_on_flip={{'{sided[0]}': '{sided[0].replace('left', 'right')}'}} ({{}} for nothing), or flip=False."
        )


def checked_options(resize: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a way of resizing reads, with defaults filled in."""
    if resize not in RESIZE_OPTIONS:
        ways = ", ".join(str(way) for way in RESIZE_OPTIONS)
        raise ValueError(f"resize={resize!r} is not a way of resizing; there are {ways}.")
    defaults = RESIZE_OPTIONS[resize]
    for name in given:
        if name not in defaults:
            raise ValueError(f"resize={resize!r} reads {', '.join(defaults)}, not {name}: leave it out.")
    options = {**defaults, **given}
    for name, value in options.items():
        if value is NEEDED:
            raise ValueError(f"resize={resize!r} needs {name}.")
        if value is not None and not _sensible(name, value):
            raise ValueError(f"{name}={value!r}: {_MEANINGS[name]}.")
    return options


def _sensible(name: str, value: Any) -> bool:
    if name == "single_category_limit":
        return _is_positive(value, int | float) and value <= 1
    numbers = [value] if name == "longest_edge" else value
    kind = int | float if name == "scale" else int
    if isinstance(numbers, str) or not isinstance(numbers, Sequence) or not numbers:
        return False
    if not all(_is_positive(number, kind) for number in numbers):
        return False
    if name in ("scale", "crop_range"):
        return len(numbers) == 2 and numbers[0] <= numbers[1]
    return name != "crop_size" or len(numbers) == 2


def _is_positive(number: Any, kind: Any) -> bool:
    return isinstance(number, kind) and not isinstance(number, bool) and 0 < number < math.inf

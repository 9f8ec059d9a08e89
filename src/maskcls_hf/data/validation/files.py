"""Reading single files: what is wrong with a file becomes a finding, never an exception."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...models.image_reading import (
    EXIF_ORIENTATION,
    TURNED,
    coloured_ids,
    image_to_tensor,
    open_image,
    read_coloured_map,
    read_label_map,
)

Find = Callable[[str, str, Path | str | None], None]  # kind, message, file

IMAGE_MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
)  # become RGB as they are


@dataclass
class Picture:
    """
    Args:
        size: (height, width), upright.
        file_size: (height, width) of the pixels in the file.
        orientation: EXIF orientation, 1 for upright.
        digest: of the bytes of the file.
    """

    size: tuple[int, int]
    file_size: tuple[int, int]
    orientation: int
    digest: bytes


def read_picture(path: Path, find: Find) -> Picture | None:
    """Decodes an image; None and a finding where that fails."""
    opened = _opened(path, "unreadable_image", find)
    if opened is None:
        return None
    image, data = opened
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        if image.mode not in IMAGE_MODES or image.format == "TIFF":  # whose samples can have a sign
            image_to_tensor(image)
    except Exception as error:  # broken headers raise errors of many types
        find("unreadable_image", str(error), path)
        return None
    width, height = image.size
    size = (width, height) if orientation in TURNED else (height, width)
    return Picture(size, (height, width), orientation, hashlib.sha1(data, usedforsecurity=False).digest())


def read_label_image(path: Path, find: Find) -> Image.Image | None:
    """Decodes a label file; None and a finding where that fails."""
    opened = _opened(path, "unreadable_label", find)
    return opened and opened[0]


def _opened(path: Path, kind: str, find: Find) -> tuple[Image.Image, bytes] | None:
    try:
        data = path.read_bytes()
        return open_image(io.BytesIO(data)), data
    except (OSError, ValueError) as error:
        find(kind, str(error), path)
    return None


def read_class_map(path: Path, find: Find) -> tuple[np.ndarray, dict[int, tuple[int, ...]]] | None:
    """Ids (H, W), and the colour of each id of a palette file; None and a finding for what is no map of ids."""
    image = read_label_image(path, find)
    if image is None:
        return None
    if len(image.getbands()) > 1:
        find("colour_label", f"mode {image.mode}: {_described_colours(image)}", path)
        return None
    try:
        ids = read_label_map(image, path.name).numpy()
    except ValueError as error:
        find("unreadable_label", str(error).removeprefix(f"{path.name}: "), path)
        return None
    return ids, _palette(image, ids)


def read_panoptic_map(path: Path, find: Find) -> np.ndarray | None:
    """Ids (H, W) int32 of a COCO panoptic PNG; None and a finding for what is none."""
    image = read_label_image(path, find)
    if image is None:
        return None
    if image.mode != "RGB":
        find("grey_panoptic", f"mode {image.mode}, {len(image.getbands())} channels", path)
        return None
    try:
        return read_coloured_map(image, path.name).numpy()
    except ValueError as error:
        find("unreadable_label", str(error).removeprefix(f"{path.name}: "), path)
        return None


def _palette(image: Image.Image, ids: np.ndarray) -> dict[int, tuple[int, ...]]:
    if image.mode != "P":
        return {}
    colours = np.array(image.getpalette("RGB") or []).reshape(-1, 3)
    return {int(i): tuple(colours[i].tolist()) for i in np.unique(ids) if i < len(colours)}


def _described_colours(image: Image.Image) -> str:
    """What the colours of a label file probably are."""
    pixels = np.asarray(image.convert("RGB"))
    if (pixels == pixels[..., :1]).all():
        return (
            "the three channels are equal, so the first one is the map: Image.open(PATH).convert('RGB').getchannel(0)"
        )
    colours = np.unique(coloured_ids(pixels))
    if np.isin(colours, coloured_ids(voc_colours())).all():
        return f"{len(colours)} colours, all of Pascal VOC's palette: the id is the place of the colour in it"
    if len(colours) <= 256:
        return f"{len(colours)} colours, so it is a palette or a legend turned into RGB"
    return f"{len(colours)} colours: smoothed by a resize or by JPEG, or a photograph"


def voc_colours() -> np.ndarray:
    """(256, 3) uint8: Pascal VOC's colour of each id, whose bits are dealt out to the channels from the top."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def compare_sizes(label_size: tuple[int, int], picture: Picture, what: str, find: Find, kind: str) -> bool:
    """Whether a label has the size (height, width) of its image; else a finding."""
    if label_size == picture.size:
        if picture.orientation != 1 and picture.size == picture.file_size:
            find("exif_turned", f"orientation {picture.orientation}, {_shown(picture.size)} either way", None)
        return True
    sizes = f"{what} is {_shown(label_size)}, the image {_shown(picture.size)}"
    if picture.orientation in TURNED and label_size == picture.file_size:
        find("exif_mismatch", f"orientation {picture.orientation}: {sizes} (width x height, upright)", None)
    else:
        turned = ", so one of the two is turned" if label_size == picture.size[::-1] else ""
        find(kind, f"{sizes} (width x height){turned}", None)
    return False


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"

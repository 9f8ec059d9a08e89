"""Maps of classes in color, with a table that says which color is which class."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ...models.image_reading import colored_ids
from ..checks import VOID_NAMES, Checked, Picture, ReportFault, compare_sizes, refuse
from ..dataset import SegmentationDataset
from ..files import checked_names, decoded, shown, some
from ..sample import Segments
from .drawing import Size
from .label_maps import LabelValues
from .shapes import SPLIT_NAMES, images_below, is_image, natural, without_suffix

logger = logging.get_logger(__name__)

TABLES = ("class_dict.csv", "class_dict_seg.csv", "label_colors.txt", "labelmap.txt", "labels.csv", "colors.txt")
IMAGE_FOLDERS = ("images", "image", "img", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "SegmentationClass")
MASK_ENDS = ("", "_L", "_mask", "_masks", "_label", "_labels", "_gt", "_labelIds", "_seg", "_color")
ENDS_OF_SPLITS = ("_labels", "_masks", "annot", "_annot", "_mask", "_label")  # CamVid: train and train_labels
VOID_ID = 65535
FIRST = re.compile(r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;:]+(.+)")
LAST = re.compile(r"(.+?)[\s,;:=]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]*")
HEX = re.compile(r"(.*?)[\s,;:=]*#([0-9a-fA-F]{6})[\s,;:]*(.*)")


class ColoredClass(NamedTuple):
    """A class of a table, and its color."""

    name: str
    color: int  # R + 256 G + 65536 B


def read_table(path: Path) -> list[ColoredClass]:
    """Classes and their colors, in the order of the file.

    It has columns name, r, g, b; lines with a name before or behind the numbers or `#RRGGBB`; or CVAT's
    label:r,g,b:parts:actions. ValueError: a line is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"#(?![0-9a-fA-F]{6})|//", line)]
    found = _of_columns(lines)
    for line in lines if found is None else ():
        found = found or []
        if path.name == "labelmap.txt" and line.count(":") >= 2:
            name, color = line.split(":")[:2]
            numbers = color.split(",")
        elif match := HEX.fullmatch(line):
            name = match[1] or match[3]
            numbers = [str(number) for number in bytes.fromhex(match[2])]
        elif match := FIRST.fullmatch(line):
            *numbers, name = match.groups()
        elif match := LAST.fullmatch(line):
            name, *numbers = match.groups()
        else:
            raise ValueError(f"{path}: {shown(line)} is no class with its color.")
        found.append((name, numbers))
    table = []
    for name, numbers in found or []:
        if len(numbers) != 3 or not all(number.strip().isdecimal() and int(number) < 256 for number in numbers):
            raise ValueError(f"{path}: {shown(name)} has the color {shown(numbers)}, not three numbers in 0..255.")
        red, green, blue = map(int, numbers)
        table.append(ColoredClass(name.strip(), red + 256 * green + 65536 * blue))
    if not table:
        raise ValueError(f"{path} names no classes.")
    if len({row.color for row in table}) < len(table):
        raise ValueError(f"{path} gives several classes one color.")
    checked_names(((place, row.name) for place, row in enumerate(table)), str(path))
    return table


def _of_columns(lines: list[str]) -> list[tuple[str, list[str]]] | None:
    """Rows of a table whose first line names its columns; None: it does not."""
    if not lines:
        return None
    mark = ";" if ";" in lines[0] else "\t" if "\t" in lines[0] else ","
    rows = list(csv.DictReader(lines, delimiter=mark, skipinitialspace=True))
    columns = {str(name).strip().lower(): name for name in (rows[0] if rows else {})}
    name = next((columns[key] for key in ("name", "class", "label", "class_name") if key in columns), None)
    for keys in (("r", "g", "b"), ("red", "green", "blue")):
        if name and all(key in columns for key in keys):
            return [(str(row[name]), [str(row[columns[key]]) for key in keys]) for row in rows]
    return None


def read_colors(path: Path) -> np.ndarray:
    """Color (H, W) int32 of each pixel of a map, of a palette too; transparency says nothing."""
    image = decoded(path, str(path))
    if getattr(image, "format", None) in ("JPEG", "WEBP"):
        raise ValueError(f"{path} is a {image.format}, which changes colors: export it again as PNG.")
    return colored_ids(np.asarray(image.convert("RGBA"))[..., :3])


def classes_of_colors(colors: np.ndarray, table: Sequence[ColoredClass], nearest: bool) -> tuple[np.ndarray, int]:
    """Place of each pixel's class in the table (H, W), `VOID_ID` for other colors, and how many pixels have these.

    Args:
        colors: (H, W), R + 256 G + 65536 B.
        table: classes and their colors.
        nearest: other colors count as the nearest one of the table.
    """
    known = np.array([row.color for row in table])
    values, inverse = np.unique(colors, return_inverse=True)
    distance = ((_channels(values)[:, None] - _channels(known)[None]) ** 2).sum(axis=-1)  # (colors, classes)
    place = distance.argmin(axis=1)
    is_known = distance.min(axis=1) == 0
    counts = np.bincount(inverse.ravel(), minlength=len(values))
    places = np.where(is_known | nearest, place, VOID_ID)
    return places[inverse].reshape(colors.shape), int(counts[~is_known].sum())


def _channels(colors: np.ndarray) -> np.ndarray:
    return np.stack([colors & 255, colors >> 8 & 255, colors >> 16], axis=-1).astype(np.int64)


class ColorMaps(SegmentationDataset):
    """Images with maps of classes in color, and a table of the colors.

    Layouts: `class_dict.csv`, `label_colors.txt` or `labelmap.txt` with `images` and `masks`, `SPLIT/images` and
    `SPLIT/masks`, `images/SPLIT` and `masks/SPLIT`, or `SPLIT` and `SPLIT_labels` as in CamVid. Pixels of a color in no
    table, and of a class named like "Void", are unlabeled.

    Args:
        root: folder of the data.
        split: such as "train"; None: there are none.
        table: the file of the colors, below the root, where it has another name.
        nearest: colors in no table count as the nearest one of the table.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: the table, a folder or a map is missing.
        ValueError: the table is broken; or (on access) a map.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        table: str | None = None,
        nearest: bool = False,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split, self.nearest = Path(root), split, nearest
        path = self.root / table if table else _table(self.root)
        rows: list[ColoredClass] = []
        try:
            if path is None or not path.is_file():
                raise FileNotFoundError(f"No table of colors in {self.root}, such as {', '.join(TABLES[:3])}.")
            rows = read_table(path)
        except (OSError, ValueError) as error:
            report("bad_class_names", str(error), path, error)
        self.table = rows
        names = {place: row.name for place, row in enumerate(rows) if row.name.lower().strip("_") not in VOID_NAMES}
        super().__init__(names, "semantic", cache=cache, report=report)
        self._values = LabelValues(self.label_ids, [])
        self._void = [place for place in range(len(rows)) if place not in names]
        folders = _folders(self.root, split)
        if folders is None:
            missing = FileNotFoundError(f"No folders of images and of maps in {self.root}, split {split}.")
            report("missing_folder", "no folders of images and of maps", self.root, missing)
        images, maps = _pairs(*folders, report) if folders else ([], [])
        self._images, self._maps = images, maps
        self.names = [without_suffix(path, folders[0]) for path in images] if folders else []

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """Usual names of the table."""
        return [root / name for name in TABLES[:3]]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether there are a table and folders of images and of maps."""
        return bool(options.get("table") or _table(root)) and _folders(root, split) is not None

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Names of folders, at the root or among the images, that have folders of images and of maps."""
        folders = [root, *(root / name for name in IMAGE_FOLDERS)]
        names = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
        return sorted(name for name in names if _folders(root, name))

    def image_path(self, index: int) -> Path:
        """File of an image."""
        return self._images[index]

    def label_path(self, index: int) -> Path:
        """The map of an image."""
        return self._maps[index]

    def annotation(self, index: int) -> str:
        """The map of an image, for messages."""
        return str(self._maps[index])

    def read(self, index: int, size: Size) -> Segments:
        """Segments of an image; warns of colors in no table."""
        classes, unknown = self._classes(index)
        if unknown:
            fate = "count as the nearest one" if self.nearest else "are unlabeled"
            logger.warning_once(f"{self.annotation(index)}: {unknown} pixels have colors in no table and {fate}.")
        return self._values(torch.from_numpy(classes), self.annotation(index))

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """Reports a map that cannot be read or has another size, and colors in no table."""
        try:
            classes, unknown = self._classes(index)
        except (OSError, ValueError) as error:
            report("unreadable_label", str(error))
            return None
        compare_sizes(classes.shape, picture, "the label", "size_mismatch", report)
        if unknown:
            report("unknown_color", f"{unknown} pixels ({unknown / classes.size:.2%})")
        return Checked.of(self._values(torch.from_numpy(classes), self.annotation(index)), self.label_ids)

    def _classes(self, index: int) -> tuple[np.ndarray, int]:
        classes, unknown = classes_of_colors(read_colors(self._maps[index]), self.table, self.nearest)
        return np.where(np.isin(classes, self._void), VOID_ID, classes).astype(np.int64), unknown


def _table(root: Path) -> Path | None:
    return next((root / name for name in TABLES if (root / name).is_file()), None)


def _folders(root: Path, split: str | None) -> tuple[Path, Path] | None:
    """Of images and of maps."""
    pairs = [(image, mask) for image in IMAGE_FOLDERS for mask in MASK_FOLDERS]
    tries: list[tuple[str, str]] = list(pairs) if not split else []
    for name in SPLIT_NAMES.get(split or "", (split,)) if split else ():
        tries += [(f"{name}/{image}", f"{name}/{mask}") for image, mask in pairs]
        tries += [(f"{image}/{name}", f"{mask}/{name}") for image, mask in pairs]
        tries += [(f"{name}", f"{name}{end}") for end in ENDS_OF_SPLITS]
    folders = ((root / image, root / mask) for image, mask in tries)
    return next((pair for pair in folders if all(map(_has_images, pair))), None)


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(is_image(path) for path in folder.iterdir())


def _pairs(images: Path, maps: Path, report: ReportFault) -> tuple[list[Path], list[Path]]:
    map_of = {without_suffix(path, maps): path for path in images_below(maps)}
    pairs = []
    for image in sorted(images_below(images), key=lambda path: natural(str(path))):
        name = without_suffix(image, images)
        key = next((name + end for end in MASK_ENDS if name + end in map_of), None)
        if key is None:
            error = FileNotFoundError(f"{image} has no map of its name in {maps}.")
            report("image_without_label", f"no map of this name in {maps.name}", image, error)
        else:
            pairs.append((image, map_of.pop(key)))
    if map_of:
        alone = FileNotFoundError(f"{len(map_of)} maps have no image in {images}: {some(list(map_of))}.")
        for path in map_of.values():
            report("label_without_image", "no image of this name", path, alone)
    return [image for image, _ in pairs], [path for _, path in pairs]

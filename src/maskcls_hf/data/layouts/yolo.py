"""YOLO's polygons: a text file for each image, a row for each object."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..checks import ReportFault, refuse
from ..files import checked_names, shown
from .drawing import box_points, draw_relative
from .shapes import (
    SPLIT_NAMES,
    Annotated,
    Background,
    Shape,
    ShapeDataset,
    Skipped,
    bad_record,
    images_below,
    is_image,
    located,
    without_suffix,
)

KEYS = ("train", "val", "test")
FARTHEST = 5  # parts of the image; points farther out are pixels


class YoloSeg(ShapeDataset):
    """Images with polygons, as Ultralytics trains on them and Roboflow, CVAT and Label Studio export them.

    Layout: `data.yaml` with `names` and, for each split, a folder of images or a list of them; the labels of
    `images/NAME.jpg` are `labels/NAME.txt`. Or `classes.txt`, `images` and `labels`. An image without labels is
    background. Confidences and track ids of predictions are left away.

    Args:
        root: folder of the data.
        split: "train", "val" or "test" as in the yaml; None: all images.
        boxes: whether rows that are boxes alone become masks; else they are skipped.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        FileNotFoundError: there is no yaml, or it has no such split, or images are missing.
        ValueError: a file is broken, or a row is. The message names file and row.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        boxes: bool = False,
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split, self.boxes = Path(root), split, boxes
        skipped = Skipped(self.root, report)
        try:
            content = described(self.root)
            names = class_names_of(content)
        except (OSError, ValueError) as error:
            report("bad_class_names", str(error), error=error)
            content, names = {}, {}
        images = [self._annotated(path, names, skipped) for path in self._images(content, split, report)]
        skipped.warn()
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The files that name the classes."""
        return [root / "data.yaml", root / "classes.txt"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether the classes are named, and data.yaml has the split."""
        try:
            content = described(root)
        except (OSError, ValueError):
            return False
        return not split or _entry(content, split) is not None

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Splits of data.yaml whose images are there; none where all have the same ones."""
        try:
            content = described(root)
        except (OSError, ValueError):
            return []
        found = [key for key in KEYS if content.get(key)]
        places = [[str(p) for p in _folders(root, content, content[key]) if p.exists()] for key in found]
        one = len(found) > 1 and places[0] and places.count(places[0]) == len(places)  # predictions: one folder for all
        return [] if one else [key for key, there in zip(found, places, strict=True) if there]

    def _images(self, content: Mapping[str, Any], split: str | None, report: ReportFault) -> list[Path]:
        keys = [key for key in KEYS if content.get(key)] if split is None else [split]
        found: dict[Path, None] = {}
        for key in keys:
            entry = _entry(content, key)
            folders = [path for path in _folders(self.root, content, entry) if path.exists()]
            if not folders and (split is not None or keys == ["train"]):
                message = f"no images of split {key}: {shown(entry)}"
                report("missing_folder", message, self.root, FileNotFoundError(f"{self.root}: {message}."))
            for path in folders:
                found |= dict.fromkeys(images_below(path) if path.is_dir() else self._listed(path, content, report))
        return list(found)

    def _listed(self, path: Path, content: Mapping[str, Any], report: ReportFault) -> list[Path]:
        """Images of a list file, one a line; they may have folders before them that are not there."""
        folders, found = [_base(self.root, content), path.parent, self.root], []
        for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
            image = located(line, folders)
            if image is None or not is_image(image):
                error = FileNotFoundError(f"{path}: no image {line}.")
                report("label_without_image", f"no image {line}", path, error)
            else:
                found.append(image)
        return found

    def _annotated(self, image: Path, names: Mapping[int, str], skipped: Skipped) -> Annotated:
        inside = f"/{image.relative_to(self.root).as_posix()}"
        before, folder, after = inside.rpartition("/images/")
        label = (self.root / f"{before}/labels/{after}".strip("/") if folder else image).with_suffix(".txt")
        name = without_suffix(self.root / f"{before}/{after}".strip("/") if folder else image, self.root)
        rows: dict[str, Shape] = {}
        lines = label.read_text(encoding="utf-8", errors="replace").splitlines() if label.is_file() else []
        parsed = [line.split() for line in lines]
        tracked = _has_tracks(parsed)
        for number, fields in enumerate(parsed, 1):
            if not fields:
                continue
            what = f"row {number}"
            try:
                shape = self._shape(fields, tracked, what, names)
            except ValueError as error:
                bad_record(skipped.report, label, what, error)
                continue
            if " ".join(fields) in rows:
                skipped("the same row again", what, label)
            elif shape is None:
                skipped("a box alone", what, label, "box_only")
            else:
                rows[" ".join(fields)] = shape
        return Annotated(name, image, str(label), list(rows.values()))

    def _shape(self, fields: list[str], tracked: bool, what: str, names: Mapping[int, str]) -> Shape | None:
        """None: a box, which is not wanted."""
        numbers = [float(field) for field in fields]
        label = numbers[0]
        if not label.is_integer() or label not in names:
            raise ValueError(f"class {fields[0]}, which the names lack")
        points = numbers[1:]
        if len(points) % 2:  # with a confidence or a track id
            points = points[:-1]
        elif tracked and len(points) > 4:
            points = points[:-2]
        if not all(math.isfinite(number) and abs(number) <= FARTHEST for number in points):
            raise ValueError("points are parts of the image's width and height, in 0..1")
        if len(points) == 4:
            x, y, width, height = points
            points = box_points(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if not self.boxes:
                return None
        if len(points) < 6:
            raise ValueError(f"{len(fields)} fields, neither a box nor a polygon of three points")
        return Shape(int(label), partial(draw_relative, points), what)


def _has_tracks(rows: list[list[str]]) -> bool:
    """Whether rows of an odd number of fields end in a confidence and a track id."""
    ends = [row[-2:] for row in rows if len(row) > 5 and len(row) % 2]
    return any(last.isdigit() and int(last) > 1 and 0 <= _number(score) <= 1 for score, last in ends)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def described(root: Path) -> dict[str, Any]:
    """The yaml of a data set, or what stands for it. FileNotFoundError: there is none."""
    paths = [root / "data.yaml", *sorted(root.glob("*.y*ml"))]
    for path in (path for path in paths if path.is_file()):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if isinstance(content, dict) and "names" in content:
            return content
    classes = root / "classes.txt"
    if classes.is_file() and (root / "images").is_dir() and any((root / "labels").glob("*.txt")):
        lines = [line.strip() for line in classes.read_text(encoding="utf-8").splitlines()]
        return {"names": dict(enumerate(filter(None, lines))), "train": "images"}
    raise FileNotFoundError(f"No data.yaml with names in {root}, and no classes.txt with images and labels.")


def class_names_of(content: Mapping[str, Any]) -> dict[int, str]:
    """Names by class id, of data.yaml's list or map. ValueError: they are neither, or bad names."""
    names = content["names"]
    pairs = enumerate(names) if isinstance(names, list) else names.items() if isinstance(names, dict) else ()
    found = checked_names(((key, str(name)) for key, name in pairs), "names")
    if not found:
        raise ValueError(f"names are {shown(names)}, no list and no map of names")
    return found


def _entry(content: Mapping[str, Any], split: str) -> Any:
    return next((content[key] for key in SPLIT_NAMES.get(split, (split,)) if content.get(key)), None) or next(
        (content[key] for key, names in SPLIT_NAMES.items() if split in names and content.get(key)), None
    )


def _base(root: Path, content: Mapping[str, Any]) -> Path:
    base = root / str(content.get("path") or ".")
    return base if base.is_dir() else root


def _folders(root: Path, content: Mapping[str, Any], entry: Any) -> list[Path]:
    """Folders and list files of a split."""
    found = []
    for name in entry if isinstance(entry, list) else [entry] if entry else []:
        parts = [part for part in Path(str(name)).parts if part not in ("..", "/")]
        tries = [_base(root, content) / str(name), root / str(name), root.joinpath(*parts)]
        tries += [root.joinpath(*parts[start:]) for start in range(1, len(parts))]
        found.append(next((p for p in tries if p.exists() and p.resolve().is_relative_to(root.resolve())), tries[-1]))
    return found

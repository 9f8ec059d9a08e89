"""LabelMe: a JSON file beside each image."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import ReportFault, refuse
from ..files import IMAGE_SUFFIXES, class_name, shown
from ..sample import VOID
from .drawing import box_points, draw_png, draw_polygon, ellipse_points, flat, unpacked
from .shapes import (
    CUT,
    Annotated,
    Background,
    Shape,
    ShapeDataset,
    Skipped,
    bad_record,
    images_below,
    json_like,
    located,
    missing_image,
    read_records,
    split_folder,
    usual_splits,
    without_suffix,
)

NO_AREA = ("line", "linestrip", "point", "points")


class LabelMe(ShapeDataset):
    """Images with shapes, as LabelMe and tools like it save them.

    Shapes of one label and `group_id` are one object. What lies below `_background_` is cut away, `__ignore__` is
    unlabeled. Lines and points are skipped. Classes stand in `labels.txt`, else they are in the order of the alphabet.

    Args:
        root: folder of the data, with the json files in it or in folders below.
        split: its folder; None: all.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        FileNotFoundError: an image is missing, and is not in the json either.
        ValueError: a file is broken, or a shape. The message names file and shape.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split = Path(root), split
        skipped = Skipped(self.root, report)
        folder = split_folder(self.root, split)
        records = [
            (path, content)
            for path, content in read_records(sorted(folder.rglob("*.json")) if folder else (), report)
            if isinstance(content, dict) and isinstance(content.get("shapes"), list)
        ]
        names = class_names_of(self.root, records)
        labels = {name: label for label, name in names.items()} | {"_background_": CUT, "__ignore__": VOID}
        top = Path(os.path.commonpath([path.parent for path, _ in records])) if records else self.root
        images = [found for path, content in records if (found := _annotated(path, content, labels, top, skipped))]
        if folder:
            known = {image.image for image in images}
            for path in images_below(folder):
                if path not in known:
                    skipped("an image without annotation", path.name, path, "not_labeled")
        skipped.warn()
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The name of the JSON of an image."""
        return [root / (split or "") / "NAME.json"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether one of the first JSON files, up to two folders down, has shapes."""
        folder = split_folder(root, split)
        if folder is None:
            return False
        first = [path for pattern in ("*.json", "*/*.json", "*/*/*.json") for path in sorted(folder.glob(pattern))[:5]]
        return any(json_like(path, ["shapes"]) for path in first)

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Folders with a usual name of a split that hold such files."""
        return [name for name in usual_splits(root) if cls.find(root, name, options)]


def class_names_of(root: Path, records: Sequence[tuple[Path, Any]]) -> dict[int, str]:
    """Those of labels.txt, then those of the shapes in the order of the alphabet; LabelMe's own ones are none."""
    table = root / "labels.txt"
    listed = [line.strip() for line in table.read_text(encoding="utf-8").splitlines()] if table.is_file() else []
    shapes = (shape for _, content in records for shape in content["shapes"] if isinstance(shape, dict))
    drawn = (shape.get("label") for shape in shapes if shape.get("shape_type") not in NO_AREA)
    used = {label for label in drawn if isinstance(label, str) and label.strip()}
    names = dict.fromkeys([*filter(None, listed), *sorted(used)])
    return dict(enumerate(name for name in names if name not in ("__ignore__", "_background_")))


def _annotated(
    path: Path, content: dict[str, Any], labels: Mapping[str, int], top: Path, skipped: Skipped
) -> Annotated | None:
    image = _image(path, content, skipped.root, skipped.report)
    if image is None:
        return None
    shapes = []
    for place, record in enumerate(content["shapes"]):
        what = f"shapes[{place}]"
        try:
            kind = record.get("shape_type") or "polygon"
            if kind in NO_AREA:
                skipped(f"a {kind} has no area", f"{what}, {record.get('label')}", path)
                continue
            label, group = class_name(record.get("label")), record.get("group_id")
            draw = _draw(kind, record)
            shapes.append(Shape(labels[label], draw, what, None if group is None else (label, group)))
        except (AttributeError, TypeError, ValueError) as error:
            bad_record(skipped.report, path, what, error)
    size = content.get("imageHeight"), content.get("imageWidth")
    known = size if all(type(side) is int for side in size) else None
    return Annotated(without_suffix(path, top), image, str(path), shapes, known)  # type: ignore[arg-type]


def _draw(kind: str, record: Mapping[str, Any]) -> Any:
    points = record.get("points")
    if kind == "polygon":
        return partial(draw_polygon, flat(points))
    if kind == "oriented_rectangle":
        return partial(draw_polygon, flat(points, 4))
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"shape_type {shown(kind)} is not known")
    (x, y, other_x, other_y) = flat(points, 2)[:4]
    if kind == "circle":
        radius = float(((x - other_x) ** 2 + (y - other_y) ** 2) ** 0.5)
        return partial(draw_polygon, ellipse_points(x, y, radius, radius))
    if kind == "mask":
        left, top = round(min(x, other_x)), round(min(y, other_y))
        return partial(draw_png, unpacked(record.get("mask")), left, top, False)
    return partial(draw_polygon, box_points(x, y, other_x, other_y))


def _image(path: Path, content: Mapping[str, Any], root: Path, report: ReportFault) -> Path | None:
    """The file of an image; where it is in the json alone, one that is written for it."""
    name = str(content.get("imagePath") or "")
    folders = [path.parent, path.parent.parent / "images", root / "images", root]
    tries = [path.parent / name.replace("\\", "/")] if name and not re.match(r"[A-Za-z]:|[/\\]", name) else []
    beside = [path.with_name(path.stem + suffix) for suffix in IMAGE_SUFFIXES]
    beside += [folder / (path.stem + suffix) for folder in folders[1:] for suffix in IMAGE_SUFFIXES]
    found = next((file for file in tries if file.is_file()), None) or (located(name, folders) if name else None)
    found = found or (None if content.get("imageData") else next((file for file in beside if file.is_file()), None))
    if found is not None:
        return Path(os.path.normpath(found))
    if content.get("imageData"):
        try:
            return _written(unpacked(content["imageData"]))
        except ValueError as error:
            bad_record(report, path, "imageData", error)
            return None
    missing_image(report, path, name, folders)
    return None


def _written(data: bytes) -> Path:
    """A file of these bytes, outside of the data."""
    folder = Path(tempfile.gettempdir()) / f"maskcls-images-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(mode=0o700, exist_ok=True)
    suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
    path = folder / f"{hashlib.sha256(data).hexdigest()}{suffix}"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)
    return path

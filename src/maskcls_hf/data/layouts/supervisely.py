"""Supervisely: a project with classes in `meta.json`, and data sets of images and JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import ReportFault, refuse
from ..files import checked_names, read_json, shown
from .drawing import draw_pixel_polygon, draw_png, unpacked
from .shapes import (
    Annotated,
    Background,
    Shape,
    ShapeDataset,
    Skipped,
    bad_record,
    images_below,
    json_like,
    missing_image,
    read_records,
    without_suffix,
)


class Supervisely(ShapeDataset):
    """Images with bitmaps, polygons and rectangles.

    Layout: `meta.json`, and in each data set `img/NAME.png` with `ann/NAME.png.json`. Points are pixels, which are
    inside with the border.

    Args:
        root: folder of the project.
        split: a data set; None: all.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or an object. The message names file and object.
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
        names: dict[int, str] = {}
        try:
            classes = read_json(self.root / "meta.json")["classes"]
            names = checked_names(enumerate(record["title"] for record in classes), str(self.root / "meta.json"))
        except (KeyError, OSError, TypeError, ValueError) as error:
            report("bad_class_names", str(error), self.root / "meta.json", error)
        labels = {name: label for label, name in names.items()}
        images: list[Annotated] = []
        data_sets = _data_sets(self.root, split)
        for folder in data_sets:
            paths = sorted(folder.glob("ann/*.json"))
            for path, content in read_records(paths, report):
                image = folder / "img" / path.stem
                if not image.is_file():
                    missing_image(report, path, path.stem, [image.parent])
                else:
                    name = without_suffix(image, folder / "img")
                    name = name if len(data_sets) == 1 else f"{folder.name}/{name}"
                    images.append(_annotated(name, image, path, content, labels, skipped))
            for image in images_below(folder / "img"):
                if not (folder / "ann" / f"{image.name}.json").is_file():
                    skipped("an image without annotation", image.name, image, "not_labeled")
        skipped.warn()
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The file of the classes, and the folder of the annotations."""
        return [root / "meta.json", root / (split or "NAME") / "ann"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether meta.json has classes and there is a folder `ann`."""
        meta = root / "meta.json"
        return meta.is_file() and json_like(meta, ["classes"]) and bool(_data_sets(root, split))

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Data sets of the project, if there are several."""
        found = [folder.relative_to(root).as_posix() for folder in _data_sets(root, None)]
        return found if len(found) > 1 else []


def _data_sets(root: Path, split: str | None) -> list[Path]:
    if split:
        return [root / split] if (root / split / "ann").is_dir() else []
    return sorted(path.parent for path in root.rglob("ann") if path.is_dir())


def _annotated(
    name: str, image: Path, path: Path, content: Any, labels: Mapping[str, int], skipped: Skipped
) -> Annotated:
    content = content if isinstance(content, dict) else {}
    objects, size = content.get("objects"), content.get("size")
    if not isinstance(objects, list):
        bad_record(skipped.report, path, "objects", f"{shown(objects)} is no list")
    shapes = []
    for place, record in enumerate(objects if isinstance(objects, list) else []):
        what = f"objects[{place}]"
        try:
            label, kind = labels[record["classTitle"]], record.get("geometryType")
            draw = _draw(record)
            if draw is None:
                skipped(f"a {kind} has no area", f"{what}, {record['classTitle']}", path)
            else:
                shapes.append(Shape(label, draw, what))
        except KeyError as error:
            bad_record(skipped.report, path, what, f"no {error}")
        except (AttributeError, TypeError, ValueError) as error:
            bad_record(skipped.report, path, what, error)
    sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else ()
    known = sides if sides and all(type(side) is int for side in sides) else None
    return Annotated(name, image, str(path), shapes, known)  # type: ignore[arg-type]


def _draw(record: Mapping[str, Any]) -> Any:
    """None: the object has no area."""
    kind = record.get("geometryType") or ("bitmap" if record.get("bitmap") else "polygon")
    if kind == "bitmap":
        left, top = (int(number) for number in record["bitmap"]["origin"])
        return partial(draw_png, unpacked(record["bitmap"]["data"], zipped=True), left, top, True)
    if kind == "polygon":
        return partial(draw_pixel_polygon, record["points"]["exterior"], record["points"].get("interior") or [])
    if kind == "rectangle":
        (left, top), (right, bottom) = record["points"]["exterior"]
        return partial(draw_pixel_polygon, [[left, top], [right, top], [right, bottom], [left, bottom]], [])
    return None

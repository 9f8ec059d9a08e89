"""Label Studio's JSON: a list of tasks with annotations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..checks import ReportFault, refuse
from ..files import shown
from .drawing import box_points, draw_brush, draw_png, draw_relative, ellipse_points, flat, turned, unpacked
from .shapes import (
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

PREFIX = r"^[0-9a-f]{8}-"  # of uploaded files
GEOMETRY = ("points", "rle", "imageDataURL", "radiusX", "width")  # one of them is in the value of a region


class LabelStudio(ShapeDataset):
    """Images with polygons, rectangles, ellipses, brush strokes and bitmasks.

    Layout: the exported JSON, with the images in `images`, beside it, or where their local paths lead. Of several
    annotations of a task the ground truth counts, else the latest. Tasks without an annotation are left out, those with
    an empty one are background. Of a region with several labels the first counts. Classes are in the order of the
    alphabet.

    Args:
        root: folder of the data.
        split: a folder with a JSON of its own; None: there are none.
        predictions: read the predictions instead of the annotations.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        FileNotFoundError: there is no JSON, or an image is missing.
        ValueError: nothing is annotated, the JSON is broken, or a region. The message names task and region.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        predictions: bool = False,
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split = Path(root), split
        skipped = Skipped(self.root, report)
        chosen: list[tuple[Path, str, Any, list[Any]]] = []  # file, name of the task, task, regions
        for path, tasks in read_records(_json_files(self.root, split), report):
            for place, task in enumerate(tasks):
                name = f"task {task.get('id', place)}" if isinstance(task, dict) else f"tasks[{place}]"
                if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
                    bad_record(report, path, name, f"{shown(task)} has no data")
                    continue
                annotation = _predicted(task) if predictions else _annotation(task)
                if annotation is None:
                    kind = "prediction" if predictions else "annotation"
                    skipped(f"a task without {kind}", name, path, "not_labeled")
                else:
                    chosen.append((path, name, task, list(_regions(annotation.get("result") or []))))
        used = {label for *_, regions in chosen for _, _, labels in regions for label in labels[:1]}
        names = dict(enumerate(sorted(used)))
        labels = {name: label for label, name in names.items()}
        images = [
            found
            for path, name, task, regions in chosen
            if (found := _annotated(path, name, task, regions, labels, skipped))
        ]
        skipped.warn()
        if not chosen:
            message = "no task is annotated; predictions, if there are, are read with predictions=True"
            report("no_images", message, self.root, ValueError(f"{self.root}: {message}."))
        if chosen and not names:
            report("bad_class_names", "no region has a label")
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """A usual name of an export."""
        return [root / (split or "") / "project.json"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether there is a JSON of tasks with annotations or predictions."""
        return bool(_json_files(root, split))

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Folders with a usual name of a split that hold such a JSON."""
        return [name for name in usual_splits(root) if _json_files(root, name)]


def _json_files(root: Path, split: str | None) -> list[Path]:
    folder = split_folder(root, split)
    paths = sorted(folder.glob("*.json")) if folder else []
    keys = ["annotations", "predictions", "completions"]
    return [path for path in paths if json_like(path, ["data"]) and json_like(path, keys)]


def _annotation(task: Mapping[str, Any]) -> Any:
    """The one that counts; None: the task has none."""
    found = [a for a in task.get("annotations") or task.get("completions") or [] if isinstance(a, dict)]
    found = [annotation for annotation in found if not annotation.get("was_cancelled")]

    def rank(annotation: Mapping[str, Any]) -> tuple[bool, str]:
        return bool(annotation.get("ground_truth")), str(annotation.get("updated_at") or annotation.get("created_at"))

    return max(found, key=rank, default=None)


def _predicted(task: Mapping[str, Any]) -> Any:
    found = [prediction for prediction in task.get("predictions") or [] if isinstance(prediction, dict)]
    return max(found, key=lambda prediction: str(prediction.get("created_at") or ""), default=None)


def _regions(results: list[Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Id, value and labels of each region, of which there can be several results; choices and relations are none."""
    merged: dict[str, dict[str, Any]] = {}
    labels: dict[str, list[str]] = {}
    for place, result in enumerate(results):
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            continue
        key = str(result.get("id", f"#{place}"))
        sizes = {name: result[name] for name in ("original_width", "original_height") if result.get(name)}
        merged[key] = merged.get(key, {}) | value | sizes
        for name, found in value.items():
            if name.endswith("labels") and isinstance(found, list):
                labels.setdefault(key, []).extend(str(label) for label in found)
    for key, value in merged.items():
        if any(name in value for name in GEOMETRY) or key in labels:
            yield key, value, labels.get(key, [])


def _annotated(
    path: Path,
    name: str,
    task: Mapping[str, Any],
    regions: list[tuple[str, dict[str, Any], list[str]]],
    labels: Mapping[str, int],
    skipped: Skipped,
) -> Annotated | None:
    image = _image(path, task, skipped.root)
    if image is None:
        missing_image(skipped.report, path, task.get("file_upload") or task["data"], [path.parent])
        return None
    shapes: list[Shape] = []
    size: Any = None
    for key, value, found in regions:
        what = f"{name}, region {key}"
        if not found:
            skipped("a region without a label", what, path)
            continue
        if len(found) > 1:
            skipped("further labels of a region", f"{what}, {', '.join(found[1:])}", path)
        own = value.get("original_height"), value.get("original_width")
        size = own if all(type(side) is int for side in own) else size
        try:
            draw = _draw(value)
            if draw is None:
                skipped("a region without an area", what, path)
            else:
                shapes.append(Shape(labels[found[0]], draw, what))
        except (KeyError, TypeError, ValueError) as error:
            bad_record(skipped.report, path, what, f"no {error}" if isinstance(error, KeyError) else error)
    folders = [folder for folder in (path.parent / "images", path.parent) if image.is_relative_to(folder)]
    return Annotated(
        without_suffix(image, folders[0] if folders else image.parent), image, f"{path}, {name}", shapes, size
    )


def _draw(value: Mapping[str, Any]) -> Any:
    """None: the region has no area."""
    if "rle" in value:
        return partial(draw_brush, value["rle"], (value["original_height"], value["original_width"]))
    if "imageDataURL" in value:
        return partial(draw_png, unpacked(value["imageDataURL"]), 0, 0, True)
    if "points" in value:
        return partial(draw_relative, [number / 100 for number in flat(value["points"])])
    if "radiusX" not in value and ("width" not in value or "height" not in value):
        return None
    # per cent -> pixels, in which angles are right, -> parts of the image
    width, height = float(value["original_width"]), float(value["original_height"])
    x, y = value["x"] * width / 100, value["y"] * height / 100
    angle = float(value.get("rotation") or 0)
    if "radiusX" in value:
        points = ellipse_points(x, y, value["radiusX"] * width / 100, value["radiusY"] * height / 100, angle)
    else:
        corners = box_points(x, y, x + value["width"] * width / 100, y + value["height"] * height / 100)
        points = turned(corners, angle, (x, y))
    sides = (width, height) * (len(points) // 2)
    return partial(draw_relative, [number / side for number, side in zip(points, sides, strict=True)])


def _image(path: Path, task: Mapping[str, Any], root: Path) -> Path | None:
    """The file of a task, with or without the digits that an upload puts before its name."""
    data = task["data"]
    value = next((data[key] for key in ("image", "img", "url") if isinstance(data.get(key), str)), None)
    value = value or next((text for text in data.values() if isinstance(text, str) and "." in text), "")
    parts = urlsplit(value)
    query = parse_qs(parts.query).get("d", [""])[0]
    names = [task.get("file_upload"), query or unquote(parts.path), value]
    folders = [path.parent, path.parent / "images", root, root / "images"]
    for name in filter(None, names):
        for form in (name, re.sub(PREFIX, "", str(name).replace("\\", "/").rpartition("/")[2])):
            if found := located(form, folders):
                return found
    bare = {re.sub(PREFIX, "", file.name): file for file in images_below(path.parent)}
    by_name = (bare.get(re.sub(PREFIX, "", str(name).replace("\\", "/").rpartition("/")[2])) for name in names if name)
    return next(filter(None, by_name), None)

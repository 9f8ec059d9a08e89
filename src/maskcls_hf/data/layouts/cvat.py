"""CVAT's XML, for images 1.1 and for video 1.1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..checks import ReportFault, refuse
from .drawing import box_points, draw_polygon, draw_rows, ellipse_points, flat, turned
from .shapes import (
    Annotated,
    Background,
    Shape,
    ShapeDataset,
    Skipped,
    bad_record,
    images_below,
    located,
    missing_image,
    split_folder,
)

WITH_AREA = ("polygon", "box", "ellipse", "mask")
Element = ElementTree.Element


class Cvat(ShapeDataset):
    """Images with shapes and tracks of a CVAT task, job or project.

    Layout: `annotations.xml` with the images in `images` or beside it; frames of a video are files whose numbers are
    those of the frames, such as `images/frame_000000.png`. Shapes of one label and `group_id` are one object. Objects
    come in their z-order, later ones on top. Polylines, points, tags, cuboids and skeletons are skipped.

    Args:
        root: folder of the data.
        split: a subset of the project, or a folder with an xml of its own; None: all images.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        FileNotFoundError: there is no xml, or an image is missing.
        ValueError: the xml is broken, or a shape. The message names image and shape.
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
        paths = _xml_files(self.root, split)
        if not paths:
            missing = FileNotFoundError(f"No annotations.xml of CVAT in {self.root}, split {split}.")
            report("missing_folder", "no annotations.xml of CVAT", self.root, missing)
        trees = {path: tree for path in paths if (tree := _tree(path, report)) is not None}
        names = dict(enumerate(dict.fromkeys(name for tree in trees.values() for name in _class_names(tree))))
        labels = {name: label for label, name in names.items()}
        images: list[Annotated] = []
        for path, tree in trees.items():
            images += _images(path, tree, labels, split, skipped)
            images += _frames(path, tree, labels, skipped)
        skipped.warn()
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The usual name of CVAT's file."""
        return [root / (split or "") / "annotations.xml"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether there is an XML of CVAT; of a split: in its folder, or with a subset of its name."""
        paths = _xml_files(root, split)
        own = split_folder(root, split)
        return bool(paths) and (not split or own == paths[0].parent or split in _subsets(paths[0]))

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Subsets of the only file at the root, or folders with files of their own."""
        if paths := _xml_files(root, None):
            return _subsets(paths[0]) if len(paths) == 1 and paths[0].parent == root else []
        return [path.name for path in root.iterdir() if path.is_dir() and _xml_files(root, path.name)]


def _xml_files(root: Path, split: str | None) -> list[Path]:
    """Those of CVAT, of a split or of the whole data."""
    folder = split_folder(root, split) if split else None
    for place in (folder, root):
        paths = sorted(place.glob("*.xml")) if place else []
        if found := [path for path in paths if _is_cvat(path)]:
            return found
    return []


def _is_cvat(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<annotations>" in file.read(1000)


def _subsets(path: Path) -> list[str]:
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError):
        return []
    return list(dict.fromkeys(image.get("subset", "") for image in tree.iter("image") if image.get("subset")))


def _tree(path: Path, report: ReportFault) -> Element | None:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        report("bad_json", f"no valid XML: {error}", path, ValueError(f"{path} is not valid XML: {error}"))
        return None


def _class_names(tree: Element) -> Iterator[str]:
    """Of the labels of the task, and of shapes whose label it lacks, in the order of the alphabet."""
    for label in tree.iterfind("meta//labels/label"):
        if label.find("parent") is None and (name := label.findtext("name")):
            yield name
    shapes = [*tree.iterfind("track"), *(shape for image in tree.iterfind("image") for shape in image)]
    yield from sorted({name for shape in shapes if (name := shape.get("label"))})


def _images(
    path: Path, tree: Element, labels: Mapping[str, int], split: str | None, skipped: Skipped
) -> Iterator[Annotated]:
    by_subset = split is not None and split in {image.get("subset") for image in tree.iterfind("image")}
    for image in tree.iterfind("image"):
        name, subset = image.get("name", ""), image.get("subset") or ""
        if by_subset and subset != split:
            continue
        folders = [path.parent / "images" / subset, path.parent / subset, path.parent / "images", path.parent]
        file = located(name, folders)
        where = f"{path}, image {name}"
        if file is None:
            missing_image(skipped.report, path, name, folders)
            continue
        shapes = _shapes(list(image), f"image {name}", labels, path, skipped)
        size = image.get("height", ""), image.get("width", "")
        known = (int(size[0]), int(size[1])) if all(side.isdecimal() for side in size) else None
        yield Annotated(str(Path(name).with_suffix("")), file, where, shapes, known)


def _frames(path: Path, tree: Element, labels: Mapping[str, int], skipped: Skipped) -> Iterator[Annotated]:
    """Frames of a video, with the shapes of the tracks that are visible in each."""
    tracks = list(tree.iterfind("track"))
    if tree.find("image") is not None or tree.find("meta") is None or not (tracks or "interpolation" in _mode(tree)):
        return
    shapes: dict[int, list[Element]] = {}
    for track in tracks:
        for shape in track:
            if shape.get("outside") == "1" or not shape.get("frame", "").isdecimal():
                continue
            shape.set("label", track.get("label", ""))
            if track.get("group_id"):
                shape.set("group_id", track.get("group_id", ""))
            shapes.setdefault(int(shape.get("frame", "")), []).append(shape)
    folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    files = images_below(folder)
    numbers = [re.search(r"([0-9]+)$", file.stem) for file in files]
    found = {int(number[1]): file for number, file in zip(numbers, files, strict=True) if number}
    if len(found) < len(files):
        found = dict(enumerate(files))
    for frame in sorted(shapes.keys() - found.keys()):
        missing_image(skipped.report, path, f"frame_{frame:06d}.png", [folder])
    for frame, file in found.items():
        of_frame = _shapes(shapes.get(frame, []), f"frame {frame}", labels, path, skipped)
        yield Annotated(file.stem, file, f"{path}, frame {frame}", of_frame)


def _mode(tree: Element) -> set[str | None]:
    return {mode.text for mode in tree.iterfind("meta//mode")}


def _shapes(
    elements: list[Element], where: str, labels: Mapping[str, int], path: Path, skipped: Skipped
) -> list[Shape]:
    shapes = []
    for place, shape in sorted(enumerate(elements), key=lambda pair: (_order(pair[1]), pair[0])):
        what = f"{where}, {shape.tag} {place}"
        if shape.tag not in WITH_AREA:
            skipped(f"a {shape.tag} has no area", what, path)
            continue
        try:
            label, group = labels[shape.get("label", "")], shape.get("group_id")
            key = (label, group) if group and group != "0" else None
            shapes.append(Shape(label, _draw(shape), what, key))
        except KeyError as error:
            bad_record(skipped.report, path, what, f"no {error}")
        except (TypeError, ValueError) as error:
            bad_record(skipped.report, path, what, error)
    return shapes


def _order(shape: Element) -> int:
    order = shape.get("z_order", "0")
    return int(order) if re.fullmatch(r"-?[0-9]+", order) else 0


def _draw(shape: Element) -> Any:
    fields = shape.attrib
    if shape.tag == "polygon":
        return partial(draw_polygon, flat([pair.split(",") for pair in fields["points"].split(";")]))
    if shape.tag == "mask":
        counts = [int(number) for number in fields["rle"].split(",")]
        x, y, width, height = (int(fields[name]) for name in ("left", "top", "width", "height"))
        if sum(counts) != width * height:
            raise ValueError(f"run lengths cover {sum(counts)} pixels, their box {width} x {height} {width * height}")
        return partial(draw_rows, counts, x, y, width, height)
    angle = float(fields.get("rotation", 0))
    if shape.tag == "box":
        left, top, right, bottom = (float(fields[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
        center = (left + right) / 2, (top + bottom) / 2
        return partial(draw_polygon, turned(box_points(left, top, right, bottom), angle, center))
    center_x, center_y, x_radius, y_radius = (float(fields[name]) for name in ("cx", "cy", "rx", "ry"))
    return partial(draw_polygon, ellipse_points(center_x, center_y, x_radius, y_radius, angle))

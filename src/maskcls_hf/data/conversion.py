"""`convert_data`: annotated images of any layout, written in another one."""

from __future__ import annotations

import base64
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from ..models.run_lengths import MaskRuns
from ..models.segments import VOID
from ..utils.tasks import Task
from ..utils.writing import write_json, write_text
from .dataset import Classes
from .files import read_colored_ids, read_map
from .layouts import find_splits, open_dataset
from .layouts.drawing import png_bytes
from .layouts.shapes import SPLIT_NAMES
from .outlines import joined, outlines
from .sample import Segments


class Writer(Protocol):
    """Writes the annotations of a split, image by image."""

    def add(self, name: str, file: str, segments: Segments, image: str | None = None) -> None:
        """Writes an annotation; `file`: of the image, as `image_place` names it; `image`: where it really is."""

    def close(self) -> None:
        """Writes what stands in one file for all images."""


class CocoWriter:
    """annotations/instances_SPLIT.json with exact run lengths; category ids from 1."""

    def __init__(self, out: Path, split: str, data: Classes, lost: Counter[str]):
        self.path, self.lost = out / "annotations" / f"instances_{split}.json", lost
        shift = int(min(data.label_ids) < 1) * (1 - min(data.label_ids))
        self.ids = [label + shift for label in data.label_ids]
        categories = [{"id": self.ids[i], "name": name, "supercategory": ""} for i, name in data.id2label.items()]
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}

    @staticmethod
    def image_place(split: str, name: str) -> str:
        """Where an image of a split is copied, below the folder that is written."""
        return f"images/{split}/{name}"

    def add(self, name: str, file: str, segments: Segments, image: str | None = None) -> None:
        """Adds the records of an image and of its segments."""
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = segments.size
        images.append({"id": len(images) + 1, "file_name": image or name, "height": height, "width": width})
        for label, mask, is_crowd in _things(segments):
            record = {"id": len(annotations) + 1, "image_id": len(images), "category_id": self.ids[label]}
            shape = {"segmentation": mask.rle(), "area": mask.area, "bbox": mask.box, "iscrowd": int(is_crowd)}
            annotations.append(record | shape)
        self.lost["unlabeled pixels, which become background"] += int(_void(segments).sum())

    def close(self) -> None:
        """Writes the JSON of the split."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


class YoloWriter:
    """data.yaml and labels/SPLIT/NAME.txt: one ring an object, whose parts and holes are joined by bridges."""

    def __init__(self, out: Path, split: str, data: Classes, lost: Counter[str]):
        self.out, self.split, self.lost = out, split, lost
        self.names = dict(data.id2label)

    @staticmethod
    def image_place(split: str, name: str) -> str:
        """Where an image of a split is copied, below the folder that is written; YOLO looks for `images/`."""
        return f"images/{split}/{name}"

    def add(self, name: str, file: str, segments: Segments, image: str | None = None) -> None:
        """Writes the label file of an image."""
        height, width = segments.size
        rows = []
        for label, mask, is_crowd in _things(segments):
            if is_crowd:
                self.lost["crowd regions"] += 1
            elif (points := joined(outlines(mask))) and mask.area:
                rows.append(" ".join([str(label), *(f"{x / width:.9g} {y / height:.9g}" for x, y in points)]))
        path = self.out / Path(file.replace("images/", "labels/", 1)).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{row}\n" for row in rows))
        self.lost["the same object again"] += len(rows) - len(set(rows))
        self.lost["unlabeled pixels, which become background"] += int(_void(segments).sum())

    def close(self) -> None:
        """Writes data.yaml; the splits that it names already stay in it."""
        path = self.out / "data.yaml"
        before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {"path": "."}
        content = before | {self.split: f"images/{self.split}", "names": self.names}
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class LabelMeWriter:
    """NAME.json beside each image, with exact masks; unlabeled pixels and crowds are `__ignore__`."""

    def __init__(self, out: Path, split: str, data: Classes, lost: Counter[str]):
        self.out, self.names, self.lost = out, dict(data.id2label), lost

    @staticmethod
    def image_place(split: str, name: str) -> str:
        """Where an image of a split is copied, below the folder that is written."""
        return f"{split}/{name}"

    def add(self, name: str, file: str, segments: Segments, image: str | None = None) -> None:
        """Writes the JSON of an image."""
        things = [(self.names[label], mask) for label, mask, is_crowd in _things(segments) if not is_crowd]
        ignored = [mask for _, mask, is_crowd in _things(segments) if is_crowd]
        self.lost["crowd regions, which become unlabeled"] += len(ignored)
        void = MaskRuns.of_masks(_void(segments)[None])[0]
        # first, as what lies below is cut away
        shapes = [("__ignore__", mask) for mask in (*ignored, void)] + things
        height, width = segments.size
        path = self.out / Path(file).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": "5.8.1", "flags": {}, "shapes": [_shape(*pair) for pair in shapes if pair[1].area]}
        sizes = {"imageData": None, "imageHeight": height, "imageWidth": width}
        write_json(path, content | {"imagePath": image or Path(file).name} | sizes)

    def close(self) -> None:
        """Writes labels.txt, which keeps the order of the classes."""
        write_text(self.out / "labels.txt", "\n".join(["__ignore__", "_background_", *self.names.values(), ""]))


def _shape(label: str, mask: MaskRuns) -> dict[str, Any]:
    left, top, width, height = mask.box
    _, inside = mask.window()
    corners = [[left, top], [left + width - 1, top + height - 1]]
    fields: dict[str, Any] = {
        "label": label,
        "points": corners,
        "group_id": None,
        "description": "",
        "shape_type": "mask",
        "flags": {},
    }
    return fields | {"mask": base64.b64encode(png_bytes(inside)).decode()}


WRITERS: dict[str, Callable[[Path, str, Classes, Counter[str]], Any]] = {
    "coco_instances": CocoWriter,
    "yolo": YoloWriter,
    "labelme": LabelMeWriter,
}


def layout_named(name: str) -> str:
    """Name of a layout that can be written, which the command line also calls coco."""
    return {"coco": "coco_instances"}.get(name, name)


def convert_data(
    root: str | Path,
    out: str | Path,
    to: str,
    layout: str | None = None,
    splits: Sequence[str | None] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes annotated images in another layout; images are copied. Data without splits becomes the split "train".

    Args:
        root: folder of the data.
        out: an empty folder, or one that is made.
        to: "coco_instances", "yolo" or "labelme".
        layout: name of the layout of the data; None: found by looking.
        splits: those to convert; empty: all.
        options: further ones of the reader, such as `boxes=True`.

    Returns:
        What the layout cannot hold, and how much of it is lost.

    Raises:
        FileNotFoundError: no known layout.
        ValueError: an unknown layout to write, a folder that is not empty, or what the reader finds wrong.
    """
    root, out, options = Path(root), Path(out), dict(options or {})
    if to not in WRITERS:
        raise ValueError(f"to={to!r}: the layouts that can be written are {', '.join(WRITERS)}.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder.")
    layout, found = find_splits(root, layout, list(splits), options)
    if not found:
        raise FileNotFoundError(f"No known layout in {root}.")
    lost: Counter[str] = Counter()
    for split in found:
        data = open_dataset(root, split, layout, **options)
        name_of_split = _split_name(split, len(found) == 1)
        if to == "yolo" and name_of_split not in ("train", "val", "test"):
            raise ValueError(f"Split {split!r}: YOLO knows train, val and test alone. Convert the splits one by one.")
        writer = WRITERS[to](out, name_of_split, data, lost)
        for index, name in enumerate(data.names):
            source = data.image_path(index)
            parts = [part for part in name.split("/") if part not in ("", "..", "images")]  # YOLO looks for /images/
            file_name = f"{'/'.join(parts)}{source.suffix}"
            file = writer.image_place(name_of_split, file_name)
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / file)
            writer.add(file_name, file, data[index]["segments"])
        writer.close()
    return {what: number for what, number in lost.items() if number}


def write_results(out: Path, to: str, task: Task, content: Mapping[str, Any]) -> dict[str, int]:
    """The results of `maskcls segment` in OUT/LAYOUT, without the images; the names in COCO's file are theirs.

    Args:
        out: folder of the results.
        to: "coco_instances", "yolo" or "labelme".
        task: of the results: "instance", "panoptic" or "semantic".
        content: of their JSON.

    Returns:
        What is lost, as for [`convert_data`].
    """
    names = {category["id"]: category["name"] for category in content["categories"]}
    lost: Counter[str] = Counter()
    classes = Classes(names, "instance")
    writer = WRITERS[to](out / to, "train", classes, lost)
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    for image in content["images"]:
        of_image, map_file = annotations.get(image["id"], []), out / "map" / image["map"]
        size = image["height"], image["width"]
        if task == "instance":
            labels = [classes.class_of_label[annotation["category_id"]] for annotation in of_image]
            masks = [annotation["segmentation"] for annotation in of_image]
            segments = Segments(torch.tensor(labels, dtype=torch.int64), masks, size=size)
        else:
            ids = read_colored_ids(map_file) if task == "panoptic" else read_map(map_file)
            known: dict[int, int | None] = {0: None} if task == "panoptic" else {}
            for found in of_image[0]["segments_info"]:
                known[found["id" if task == "panoptic" else "category_id"]] = classes.class_of_label[
                    found["category_id"]
                ]
            segments = Segments.from_ids(ids, known)
        name = str(Path(image["map"]).with_suffix(Path(image["file_name"]).suffix))
        file = writer.image_place("train", name) if to == "yolo" else name
        source = image.get("source", image["file_name"])
        place = os.path.relpath(source, out / to) if to == "labelme" else image["file_name"]
        writer.add(name, file, segments, Path(place).as_posix())
    writer.close()
    return {what: number for what, number in lost.items() if number}


def _split_name(split: str | None, is_only: bool) -> str:
    """As most tools call it; data of one split is for training, whatever its name."""
    usual = next((usual for usual, names in SPLIT_NAMES.items() if split in names), split)
    return "train" if usual is None or is_only and usual not in ("val", "test") else usual.replace("/", "_")


def _things(segments: Segments) -> list[tuple[int, MaskRuns, bool]]:
    """Class, mask and whether it is a crowd, of each segment."""
    found = zip(segments.class_labels.tolist(), segments.mask_runs, segments.is_crowd.tolist(), strict=True)
    return list(found)


def _void(segments: Segments) -> Any:
    """Unlabeled pixels (H, W)."""
    if segments.is_map:
        return (segments.index_map == VOID).numpy()
    void = segments.void
    return (torch.zeros(segments.size, dtype=torch.bool) if void is None else void).numpy()

"""What a split holds, by a look at its folder: laxer than the readers, so that one fault does not hide the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..dataset import Kind
from ..files import IMAGE_SUFFIXES, LABEL_SUFFIXES, some
from ..folder_dataset import (
    LABEL_FOLDERS,
    VOID_VALUES,
    ade20k_names,
    as_values,
    below,
    check_void,
    class_names_of,
    holds_instances,
)
from .files import Find, Picture, compare_sizes, read_class_map
from .rules import Finding
from .segments import ImageLabels, Segment, blobs, vanished

LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")


class Item(NamedTuple):
    """An image and its annotation; either can be missing. `record` is what a json says of it."""

    image: Path | None
    label: Path | None = None
    record: Any = None


class Survey(ABC):
    """Images, annotations and classes of a split.

    Attributes:
        items: what there is to check.
        classes: label id in the files -> name; empty where it cannot be read.
        stuff: label ids of stuff.
        findings: of the survey itself.
    """

    kind: Kind = "semantic"
    expects_things = False  # an image without an instance is worth a note

    def __init__(self, root: Path, split: str | None, options: Mapping[str, Any], size: Mapping[str, int] | None):
        self.root, self.split, self.options, self.training_size = root, split, options, size
        self.items: list[Item] = []
        self.classes: dict[int, str] = {}
        self.stuff: set[int] = set()
        self.findings: list[Finding] = []

    @abstractmethod
    def read_labels(self, item: Item, picture: Picture | None, find: Find) -> ImageLabels | None:
        """Annotation of an image; None and findings where it cannot be read."""

    def has_labels(self, item: Item) -> bool:
        return item.label is not None

    def find(self, kind: str, message: str, file: Path | str | None = None) -> None:
        self.findings.append(Finding(kind, message, self.split, self.shown(file)))

    def shown(self, file: Path | str | None) -> str | None:
        """A path as below the data folder."""
        if isinstance(file, Path) and file.is_relative_to(self.root):
            file = file.relative_to(self.root)
        return None if file is None else str(file)

    def name_of(self, label: int) -> str:
        return self.classes.get(label, f"label {label}")


class MapSurvey(Survey):
    """Label maps beside images: each pixel holds a class id, or an instance id."""

    def __init__(self, root: Path, split: str | None, options: Mapping[str, Any], size: Mapping[str, int] | None):
        super().__init__(root, split, options, size)
        self.void_values: set[int] = set()
        self.look()
        if self.kind == "semantic":
            self.stuff = set(self.classes)

    @abstractmethod
    def look(self) -> None:
        """Fills items, classes and void values."""

    def segment_of(self, value: int) -> tuple[int | None, bool]:
        """Label id of a pixel value, None for void, and whether it is a crowd. KeyError: no such class."""
        if value in self.void_values:
            return None, False
        if self.classes and value not in self.classes:
            raise KeyError(value)
        return value, False

    def read_labels(self, item: Item, picture: Picture | None, find: Find) -> ImageLabels | None:
        assert item.label is not None
        read = read_class_map(item.label, find)
        if read is None:
            return None
        ids, palette = read
        height, width = ids.shape
        if picture is not None:
            compare_sizes((height, width), picture, "the label", find, "size_mismatch")
        return self._labels(ids, palette, find)

    def _labels(self, ids: np.ndarray, palette: dict[int, tuple[int, ...]], find: Find) -> ImageLabels:
        height, width = ids.shape
        found, lost = blobs(ids), vanished(ids, self.training_size)
        labels = ImageLabels((height, width), values=set(found), palette=palette)
        unknown: dict[int, int] = {}
        for value, blob in found.items():
            try:
                label, crowd = self.segment_of(value)
            except KeyError:
                unknown[value] = blob.area
                continue
            if label is None:
                labels.void += blob.area
            else:
                labels.segments.append(Segment(label, blob.area, crowd, value in lost))
        if unknown:
            share = sum(unknown.values()) / ids.size
            find("ids_outside", f"values {some(list(unknown), 8)} on {share:.2%} of the pixels", None)
        return labels


class FolderSurvey(MapSurvey):
    """`SegmentationFolder`."""

    image_pattern = "{split}/images"
    label_pattern: str | None = None

    def look(self) -> None:
        images = below(self.root, self.options.get("image_folder") or self.image_pattern, self.split)
        labels = self._label_folder(images)
        for kind, folder in (("image", images), ("label", labels)):
            if not folder.is_dir():
                self.find("missing_folder", f"no folder of {kind} files", folder)
        self._read_classes(labels)
        found = {
            kind: self._by_stem(folder, suffixes, kind)
            for kind, folder, suffixes in (("image", images, IMAGE_SUFFIXES), ("label", labels, LABEL_SUFFIXES))
            if folder.is_dir()
        }
        if not found.get("image"):
            self.find("no_images", "no images", images)
        self._pair(found.get("image", {}), found.get("label"), labels)

    def _label_folder(self, images: Path) -> Path:
        pattern = self.options.get("label_folder") or self.label_pattern
        if pattern:
            return below(self.root, pattern, self.split)
        there = [images.parent / name for name in LABEL_FOLDERS if (images.parent / name).is_dir()]
        if len(there) > 1:
            names = " and ".join(path.name for path in there)
            self.find("missing_folder", f"{names} are there: choose with label_folder in the recipe", images.parent)
        return there[0] if there else images.parent / LABEL_FOLDERS[0]

    def _read_classes(self, labels: Path) -> None:
        given: set[int] = set()
        has_instances = False
        try:
            self.classes, no_classes = self._class_names()
            given = as_values(self.options.get("void_values", ()))
            has_instances = holds_instances(labels, self.options.get("instances"))
            if not has_instances:
                given |= set(no_classes)
                check_void(self.classes, given)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.find("bad_class_names", str(error))
        self.void_values = given if has_instances else {*given, *VOID_VALUES} - set(self.classes)
        if has_instances:
            self.kind, self.stuff, self.expects_things = "panoptic", {0}, True
            if len(self.classes) > 1:
                self.find("bad_class_names", f"{len(self.classes)} classes, but instance maps have one class of things")
            thing = next(iter(self.classes.values()), "thing")
            self.classes = {0: self.options.get("background", "background"), 1: thing}

    def _class_names(self) -> tuple[dict[int, str], list[int]]:
        return class_names_of(self.root, self.options.get("id2label"))

    def segment_of(self, value: int) -> tuple[int | None, bool]:
        if self.kind == "semantic":
            return super().segment_of(value)
        if value in self.void_values:
            return None, False
        if not 0 <= value < 2**31:
            raise KeyError(value)
        return int(value != 0), False

    def _by_stem(self, folder: Path, suffixes: Sequence[str], kind: str) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            if path.suffix.lower() not in suffixes:
                if path.name[0] != "." and (kind == "image" or path.suffix.lower() not in LOSSY_SUFFIXES):
                    self.find("file_not_listed", f"not read as {kind}: {path.suffix or 'no'} file", path)
            elif path.stem in paths:
                self.find("same_name", f"the {kind} {paths[path.stem].name} has this name too", path)
            else:
                paths[path.stem] = path
        return paths

    def _pair(self, images: dict[str, Path], labels: dict[str, Path] | None, label_folder: Path) -> None:
        self.items = [Item(path, (labels or {}).get(stem)) for stem, path in images.items()]
        if labels is None:
            return
        alone = sorted(set(labels) - set(images))
        for stem in sorted(set(images) - set(labels)):
            lossy = [path for suffix in LOSSY_SUFFIXES if (path := label_folder / f"{stem}{suffix}").is_file()]
            if lossy:
                self.find("lossy_label", "label maps are PNG, TIFF or BMP", lossy[0])
                continue
            place = bisect_left(alone, stem)
            near = alone[place] if place < len(alone) and alone[place].startswith(stem) else None
            hint = f", but {labels[near].name}: both must have one name" if near else ""
            self.find("image_without_label", f"no {self.shown(label_folder)}/{stem}.png{hint}", images[stem])
        for stem in alone:
            self.find("label_without_image", "no image of this name", labels[stem])
            self.items.append(Item(None, labels[stem]))


class AdeSurvey(FolderSurvey):
    """`Ade20k`."""

    image_pattern, label_pattern = "images/{split}", "annotations/{split}"

    def _class_names(self) -> tuple[dict[int, str], list[int]]:
        return ade20k_names(self.root, self.options.get("id2label")), [0]

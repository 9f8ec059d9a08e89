"""Pascal VOC: palette maps of classes and of objects with lists of the splits; in color, too, as CVAT exports them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...models.image_reading import colored_ids
from ...models.run_lengths import Runs
from ..checks import VOID_NAMES, ReportFault, refuse
from ..dataset import SegmentationDataset
from ..files import IMAGE_SUFFIXES, decoded, read_map, some
from ..sample import VOID, Segments
from .colors import VOID_ID, classes_of_colors, read_colors, read_table
from .drawing import Size
from .shapes import SPLIT_NAMES, Skipped, missing_image, natural

VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LISTS = "ImageSets/Segmentation"
CLASSES, OBJECTS = ("SegmentationClass", "SegmentationClassPNG"), ("SegmentationObject", "SegmentationObjectPNG")


class PascalVoc(SegmentationDataset):
    """Images with maps of classes, and maps of objects where these are there.

    Layout: `JPEGImages`, `SegmentationClass`, `SegmentationObject` and lists in `ImageSets/Segmentation`. The names of
    classes are those of `labelmap.txt` (maps in color: CVAT), of `class_names.txt` (LabelMe), else Pascal's. With
    objects the data is of instances, and pixels of a class without an object are unlabeled; else background is a class.
    255 is unlabeled.

    Args:
        root: folder of the data.
        split: name of a list; None: the images of all lists, or without lists all that have a map.
        nearest: colors in no table count as the nearest one of the table; else they are unlabeled.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: a folder, a list, an image or a map is missing.
        ValueError: the names cannot be read; or (on access) a map.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        nearest: bool = False,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split, self.nearest = Path(root), split, nearest
        self._class_folder, self._object_folder = _folder(self.root, CLASSES), _folder(self.root, OBJECTS)
        names: dict[int, str] = dict(enumerate(VOC_NAMES))
        self.table = None
        try:
            if (path := self.root / "labelmap.txt").is_file():
                self.table = read_table(path)
                names = {place: row.name for place, row in enumerate(self.table)}
            elif (path := self.root / "class_names.txt").is_file():
                names = dict(enumerate(line.strip() for line in path.read_text(encoding="utf-8").splitlines()))
        except (OSError, ValueError) as error:
            report("bad_class_names", str(error), path, error)
        self._ignored = {label for label, name in names.items() if name.lower().strip("_") in VOID_NAMES}
        self._no_object = {label for label, name in names.items() if name.lower().strip("_") == "background"}
        has_objects = self._object_folder is not None
        dropped = self._ignored | (self._no_object if has_objects else set())
        names = {label: name for label, name in names.items() if label not in dropped and name}
        super().__init__(names, "instance" if has_objects else "semantic", cache=cache, report=report)
        self.expects_things = has_objects
        skipped = Skipped(self.root, report)
        self.names, self._images = self._listed(split, skipped)
        skipped.warn()
        if not self.names:
            report("no_images", "no images", self.root, ValueError(f"No annotated images in {self.root}."))

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The folder of the class maps, and the list of the split's images."""
        return [root / "SegmentationClass", root / f"{LISTS}/{split or 'train'}.txt"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether there is a folder of class maps, and a list of the split's images."""
        return _folder(root, CLASSES) is not None and (not split or _list(root, split) is not None)

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Names of the lists; trainval only where it is the only one."""
        names = [path.stem for path in (root / LISTS).glob("*.txt")]
        return [name for name in names if name != "trainval" or len(names) == 1]

    def _listed(self, split: str | None, skipped: Skipped) -> tuple[list[str], list[Path]]:
        """Names and image files; an image without a map is empty for CVAT, and unlabeled for others."""
        classes = self._class_folder or self.root
        lists = [_list(self.root, split)] if split else sorted((self.root / LISTS).glob("*.txt"))
        listed = [line.split() for path in lists if path for line in path.read_text(encoding="utf-8").splitlines()]
        stems = list(dict.fromkeys(fields[0] for fields in listed if fields))
        if not lists:
            stems = [path.relative_to(classes).with_suffix("").as_posix() for path in classes.rglob("*.png")]
        if split and lists == [None]:
            missing = FileNotFoundError(f"No list {split}.txt in {self.root / LISTS}.")
            skipped.report("missing_folder", f"no list {split}.txt", self.root / LISTS, missing)
        names, images = [], []
        for stem in sorted(stems, key=natural):
            folders = [self.root / "JPEGImages", self.root / "images"]
            found = (folder / f"{stem}{suffix}" for folder in folders for suffix in (*IMAGE_SUFFIXES, ".JPG"))
            image = next((path for path in found if path.is_file()), None)
            if image is None:
                missing_image(skipped.report, lists[0] if lists and lists[0] else classes, stem, folders)
            elif self.table is None and not (classes / f"{stem}.png").is_file():
                skipped("an image without a map", stem, image, "not_labeled")
            else:
                names.append(stem)
                images.append(image)
        return names, images

    def image_path(self, index: int) -> Path:
        """File of an image."""
        return self._images[index]

    def label_path(self, index: int) -> Path | None:
        """The class map of an image; None: it has none, and is empty."""
        path = (self._class_folder or self.root) / f"{self.names[index]}.png"
        return path if path.is_file() else None

    def annotation(self, index: int) -> str:
        """Where the class map of an image is or would be, for messages."""
        return str((self._class_folder or self.root) / f"{self.names[index]}.png")

    def read(self, index: int, size: Size) -> Segments:
        """Segments of an image: objects where there are maps of objects, else classes."""
        path = self.label_path(index)
        classes = np.zeros(size, dtype=np.int64) + min(self._no_object, default=0)
        if path is not None:
            classes = self._classes(path)
        void = np.isin(classes, [VOID_ID, *self._ignored])
        if not self.has_instances:
            known: dict[int, int | None] = {**self.class_of_label, VOID_ID: VOID}
            return Segments.from_ids(Runs.of(np.where(void, VOID_ID, classes)), self._all_known(classes, known, index))
        objects = np.zeros_like(classes)
        if path is not None and self._object_folder is not None:
            objects = self._objects(
                self._object_folder / path.name
                if path.parent == self._class_folder
                else self._object_folder / path.relative_to(self._class_folder or self.root)
            )
        if objects.shape != classes.shape:
            raise ValueError(f"{path}: the maps of classes and of objects differ in size.")
        inside = ~np.isin(classes, list(self._no_object))
        void |= (objects == VOID_ID) | inside & (objects == 0)
        objects = np.where(void, VOID_ID, np.where(objects >= VOID_ID, objects + 1, objects))
        class_of: dict[int, int | None] = {0: None, VOID_ID: VOID}
        for own_id in np.unique(objects).tolist():
            if own_id not in class_of:
                under = np.bincount(classes[(objects == own_id) & inside]) if inside.any() else np.zeros(0)
                label = int(under.argmax()) if under.sum() else None
                if label is None:
                    raise ValueError(f"{self.annotation(index)}: object {own_id} lies on background alone.")
                if label not in self.class_of_label:
                    raise ValueError(f"{self.annotation(index)} holds {label}, which is no class.")
                class_of[own_id] = self.class_of_label[label]
        return Segments.from_ids(objects, class_of)

    def _all_known(self, classes: np.ndarray, known: dict[int, int | None], index: int) -> dict[int, int | None]:
        values = np.unique(classes).tolist()
        if unknown := [value for value in values if value not in known and value not in self._ignored]:
            raise ValueError(f"{self.annotation(index)} holds {some(unknown)}, which is no class.")
        return known

    def _classes(self, path: Path) -> np.ndarray:
        """(H, W), `VOID_ID` where unlabeled."""
        if self.table is not None:
            return classes_of_colors(read_colors(path), self.table, self.nearest)[0]
        classes = read_map(path).numpy().astype(np.int64)
        return np.where(classes == 255, VOID_ID, classes)

    def _objects(self, path: Path) -> np.ndarray:
        """(H, W), 0 for none, `VOID_ID` where unlabeled; in color each color is an object."""
        image: Any = decoded(path, str(path))
        if len(image.getbands()) > 1:
            return colored_ids(np.asarray(image.convert("RGBA"))[..., :3]).astype(np.int64)
        objects = read_map(path).numpy().astype(np.int64)
        return np.where(objects == 255, VOID_ID, objects) if image.mode in ("P", "L") else objects


def _folder(root: Path, names: Iterable[str]) -> Path | None:
    """The first folder that has maps."""
    folders = (root / name for name in names)
    return next((folder for folder in folders if folder.is_dir() and any(folder.rglob("*.png"))), None)


def _list(root: Path, split: str) -> Path | None:
    names = (root / LISTS / f"{name}.txt" for name in SPLIT_NAMES.get(split, (split,)))
    return next((path for path in names if path.is_file()), None)

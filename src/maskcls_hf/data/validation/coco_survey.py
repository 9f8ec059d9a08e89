"""Survey of COCO instances: the json record by record, then the mask of each annotation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from ..coco_files import find_image_folder, find_json
from ..coco_instances import run_lengths
from ..files import IMAGE_SUFFIXES, read_json
from .files import Find, Picture, compare_sizes
from .segments import Blob, ImageLabels, Segment, area_differs, box_differs, vanished_masks
from .survey import Item, Survey

NAMES_TRIED = 50  # names of the json by which the folder of its files is looked for

FIELD_TYPES: dict[str, type | tuple[type, ...]] = {  # else int
    "file_name": str,
    "name": object,
    "image_id": (int, str),
    "id": (int, str),
    "segments_info": list,
}


class CocoSurvey(Survey):
    """What the two formats share."""

    json_kind: str

    def __init__(self, root: Path, split: str | None, options: Mapping[str, Any], size: Mapping[str, int] | None):
        super().__init__(root, split, options, size)
        given = options.get("annotations")
        path = root / given if given else find_json(root, split, self.json_kind)
        self.json_path = path or root / f"{self.json_kind}.json"
        content = self._content()
        self._read_categories(self._records(content, "categories", ("id", "name")))
        images = self._images(self._records(content, "images", ("id", "file_name", "height", "width")))
        folder = self._folder("image_folder", [image["file_name"] for image in images.values()], self._image_folder)
        self._read_annotations(self._records(content, "annotations", self.annotation_keys), images, folder)

    annotation_keys: tuple[str, ...]

    @abstractmethod
    def _read_categories(self, categories: list[Any]) -> None: ...

    @abstractmethod
    def _read_annotations(self, annotations: list[Any], images: dict[Any, Any], folder: Path | None) -> None: ...

    def _content(self) -> dict[str, Any]:
        try:
            content = read_json(self.json_path)
        except (OSError, ValueError) as error:
            self.find("bad_json", str(error), self.json_path)
            return {}
        if not isinstance(content, dict):
            self.find("bad_json", f"holds a {type(content).__name__}, not images and annotations", self.json_path)
            return {}
        return content

    def _records(self, content: dict[str, Any], key: str, needed: tuple[str, ...]) -> list[Any]:
        """Records that are complete."""
        if not content:
            return []
        records = content.get(key)
        if not isinstance(records, list):
            self.find("bad_json", f"has no list of {key}", self.json_path)
            return []
        good = []
        for place, record in enumerate(records):
            wrong = wrong_fields(record, needed)
            if key == "categories" and not wrong and not isinstance(record["id"], int):
                wrong = f"id is {record['id']}, not a number"
            if wrong:
                self.find("bad_record", f"{key}[{place}]: {wrong}", self.json_path)
            else:
                good.append(record)
        return good

    def _images(self, records: list[Any]) -> dict[Any, Any]:
        images: dict[Any, Any] = {}
        names: set[str] = set()
        for record in records:
            if record["id"] in images:
                other = images[record["id"]]["file_name"]
                self.find("double_id", f"image id {record['id']} is that of {other} too", record["file_name"])
                continue
            if record["file_name"] in names:
                self.find("same_name", f"several image records, one with id {record['id']}", record["file_name"])
            names.add(record["file_name"])
            images[record["id"]] = record
        if not images:
            self.find("no_images", "no images are listed", self.json_path)
        return images

    def _folder(self, option: str, names: list[str], find_folder: Callable[[str], Path]) -> Path | None:
        """Folder of the files, by the first name that is found."""
        if self.options.get(option):
            return self.root / self.options[option]
        error: Exception | None = None
        for name in names[:NAMES_TRIED]:
            try:
                return find_folder(name)
            except FileNotFoundError as missing:
                error = error or missing
        if error:
            self.find("missing_folder", str(error), self.json_path)
        return None

    def _image_folder(self, name: str) -> Path:
        return find_image_folder(self.root, self.split, self.json_path, name)

    def _image_path(self, record: Any, folder: Path | None) -> Path | None:
        if folder is None:
            return None
        path = folder / record["file_name"]
        if path.is_file():
            return path
        self.find("label_without_image", f"listed as image {record['id']}, but not in {self.shown(folder)}", path)
        return None

    def _note_unlisted(self, folder: Path | None, names: set[str], what: str) -> None:
        """Files beside those of the json; those of folders below are left alone."""
        for path in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
            if path.suffix.lower() in IMAGE_SUFFIXES and path.name not in names:
                self.find("file_not_listed", f"no {what} of {self.json_path.name}", path)

    def _check_size(self, record: Any, picture: Picture | None, find: Find) -> None:
        if picture is not None:
            size = (int(record["height"]), int(record["width"]))
            compare_sizes(size, picture, "the json", find, "json_size_mismatch")

    def _check_numbers(self, record: Any, blob: Blob, what: str, slack: bool, find: Find) -> None:
        """Area and box of a json record against its mask."""
        try:
            if record.get("area") is not None and area_differs(record["area"], blob, slack):
                find("area_mismatch", f"{what}: area {record['area']}, mask {blob.area}", None)
            if record.get("bbox") is not None and (wrong := box_differs(record["bbox"], blob, slack)):
                find("box_mismatch", f"{what}: {wrong}", None)
        except (TypeError, ValueError):
            find("bad_record", f"{what}: area {record.get('area')!r}, bbox {record.get('bbox')!r}", None)


def wrong_fields(record: Any, needed: tuple[str, ...]) -> str | None:
    """What is wrong with the fields of a record; None: nothing."""
    if not isinstance(record, dict):
        return f"{str(record)[:40]} is no record"
    if missing := [name for name in needed if name not in record]:
        return f"no {', '.join(missing)}"
    for name in {*needed, "id"} & set(record):
        value = record[name]
        whole = isinstance(value, float) and value.is_integer()
        fits = whole or isinstance(value, FIELD_TYPES.get(name, int))
        if not fits or (name in ("height", "width") and value < 1):
            return f"{name} is {str(value)[:40]}"
    return None


class CocoInstancesSurvey(CocoSurvey):
    """`CocoInstances`."""

    kind, json_kind, expects_things = "instance", "instances", True
    annotation_keys = ("image_id", "category_id")

    def _read_categories(self, categories: list[Any]) -> None:
        for category in categories:
            if category["id"] in self.classes:
                self.find("double_id", f"category id {category['id']}", self.json_path)
            self.classes[category["id"]] = str(category["name"])

    def _read_annotations(self, annotations: list[Any], images: dict[Any, Any], folder: Path | None) -> None:
        of_image: dict[Any, list[Any]] = {image_id: [] for image_id in images}
        ids: set[Any] = set()
        for annotation in annotations:
            name = f"annotation {annotation.get('id')}"
            if annotation["image_id"] not in of_image:
                self.find("orphan_annotation", f"{name} is of image {annotation['image_id']}", self.json_path)
                continue
            file_name = images[annotation["image_id"]]["file_name"]
            if annotation["category_id"] not in self.classes:
                self.find("unknown_category", f"{name} is of category {annotation['category_id']}", file_name)
                continue
            if "id" in annotation and annotation["id"] in ids:
                self.find("double_annotation_id", f"{name} is there more than once", file_name)
            ids.add(annotation.get("id"))
            of_image[annotation["image_id"]].append(annotation)
        for image_id, record in images.items():
            self.items.append(Item(self._image_path(record, folder), record=(record, of_image[image_id])))
        self._note_unlisted(folder, {Path(record["file_name"]).name for record in images.values()}, "image")

    def has_labels(self, item: Item) -> bool:
        return True

    def read_labels(self, item: Item, picture: Picture | None, find: Find) -> ImageLabels:
        record, annotations = item.record
        self._check_size(record, picture, find)
        size = (int(record["height"]), int(record["width"]))
        labels = ImageLabels(size)
        masks, found = [], []
        for annotation in annotations:
            what = f"annotation {annotation.get('id')}"
            try:
                mask = run_lengths(annotation.get("segmentation"), size, what)
            except (ValueError, TypeError, KeyError) as error:
                find("bad_segmentation", str(error), None)
                continue
            left, top, width, height = (int(number) for number in coco_mask.toBbox(mask))
            blob = Blob(int(coco_mask.area(mask)), (left, top, width, height))
            if blob.area == 0:
                find("empty_segment", f"{what}, {self.name_of(annotation['category_id'])}: no pixel", None)
                continue
            self._check_numbers(annotation, blob, what, True, find)
            masks.append(mask)
            found.append(blob)
            labels.segments.append(Segment(annotation["category_id"], blob.area, bool(annotation.get("iscrowd", 0))))
        lost = vanished_masks(masks, found, size, self.training_size)
        for segment, is_lost in zip(labels.segments, lost, strict=True):
            segment.lost = is_lost
        return labels

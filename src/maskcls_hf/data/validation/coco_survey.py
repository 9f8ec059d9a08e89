"""Survey of COCO instances: the json record by record, then the mask of each annotation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...models.run_lengths import MaskRuns
from ..coco_files import NamedFiles, choose_json, find_image_folder
from ..coco_instances import is_relative, run_lengths
from ..coco_records import UNREAD, CocoContent, CocoKind
from ..files import IMAGE_SUFFIXES, read_json, require_folder, shown
from .files import Find, Picture, compare_sizes
from .segments import Blob, ImageLabels, Segment, area_differs, box_differs, vanished_masks
from .survey import Item, Survey

MOST_UNSEEN = 2**26  # pixels of an image that cannot be read: masks of more are not drawn, as the json alone says so


class CocoSurvey(Survey):
    """What the two formats share."""

    json_kind: CocoKind

    def __init__(self, root: Path, split: str | None, options: Mapping[str, Any], size: Mapping[str, int] | None):
        super().__init__(root, split, options, size)
        self.json_path = root / f"{self.json_kind}.json"
        content = CocoContent(self._content(), self.json_kind, self._report)
        self.classes, self.stuff = content.class_names, set(content.stuff)
        names = [image["file_name"] for image in content.images.values()]
        given = self.options.get("image_folder")
        folder = self._folder(
            "image", names, lambda: find_image_folder(root, split, self.json_path, self.json_kind, names, given)
        )
        self._add_items(content, folder)
        self._note_unlisted(folder, {self._name(item) for item in self.items}, "image")

    @abstractmethod
    def _add_items(self, content: CocoContent, folder: NamedFiles | None) -> None: ...

    def _content(self) -> Any:
        """Of the json; `UNREAD` and a finding where it cannot be read."""
        try:
            path = choose_json(self.root, self.split, self.json_kind, self.options.get("annotations"))
            self.json_path = path
            return read_json(path)
        except (OSError, ValueError) as error:
            self.find("bad_json", str(error), self.json_path if self.json_path.is_file() else None)
            return UNREAD

    def _report(self, rule: str, message: str, file: str | None) -> None:
        self.find(rule, message, file or self.json_path)

    def _folder(self, kind: str, names: list[str], find_folder: Callable[[], Path]) -> NamedFiles | None:
        """Folder of the files of these names; None, and a finding, where it is not there."""
        if not names:
            return None
        try:
            folder = find_folder()
            require_folder(folder, kind)
            return NamedFiles(self.root, folder)
        except (OSError, ValueError) as error:
            self.find("missing_folder", str(error), self.json_path)
            return None

    def _path(self, name: str, folder: NamedFiles | None, rule: str, message: str, file: Any) -> Path | None:
        """A file of the json; None and a finding where it is not there."""
        if folder is None:
            return None
        try:
            return folder.folder / folder.find(name)
        except ValueError as error:
            self.find("bad_record", f"file_name {error}", self.json_path)
        except FileNotFoundError as error:
            self.find(rule, f"{message} {error}", file or folder.folder / name)
        return None

    def _image_path(self, record: Any, folder: NamedFiles | None) -> Path | None:
        shown_folder = self.shown(folder.folder) if folder else ""
        message = f"listed as image {shown(record['id'])}, but not in {shown_folder}:"
        return self._path(record["file_name"], folder, "label_without_image", message, None)

    def _name(self, item: Item) -> str:
        return Path(item.record[0]["file_name"] if item.image is None else item.image).name

    def _note_unlisted(self, files: NamedFiles | None, names: set[str], what: str) -> None:
        """Files beside those of the json; those of folders below are left alone."""
        for path in sorted(files.folder.iterdir()) if files else ():
            if path.suffix.lower() in IMAGE_SUFFIXES and path.name not in names:
                self.find("file_not_listed", f"no {what} of {self.json_path.name}", path)

    def _check_size(self, record: Any, picture: Picture | None, find: Find) -> tuple[int, int]:
        """Size of an image, whose file says it better than the json."""
        size = record["height"], record["width"]
        if picture is None:
            return size
        compare_sizes(size, picture, "the json", find, "json_size_mismatch")
        return picture.size

    def _check_numbers(self, record: Any, blob: Blob, what: str, slack: bool, find: Find) -> None:
        """Area and box of a json record against its mask."""
        if record.get("area") is not None and area_differs(record["area"], blob, slack):
            find("area_mismatch", f"{what}: area {record['area']}, mask {blob.area}", None)
        if record.get("bbox") is not None and (wrong := box_differs(record["bbox"], blob, slack)):
            find("box_mismatch", f"{what}: {wrong}", None)


class CocoInstancesSurvey(CocoSurvey):
    """`CocoInstances`."""

    kind, json_kind, expects_things = "instance", "instances", True

    def _add_items(self, content: CocoContent, folder: NamedFiles | None) -> None:
        for image_id, record in content.images.items():
            path = self._image_path(record, folder)
            self.items.append(Item(path, record=(record, content.annotations[image_id])))

    def has_labels(self, item: Item) -> bool:
        return True

    def read_labels(self, item: Item, picture: Picture | None, find: Find) -> ImageLabels | None:
        record, annotations = item.record
        size = self._check_size(record, picture, find)
        if picture is None and size[0] * size[1] > MOST_UNSEEN:
            return None
        labels = ImageLabels(size)
        masks = []
        for annotation in annotations:
            what = f"annotation {shown(annotation.get('id'))}"
            segmentation, label = annotation.get("segmentation"), annotation["category_id"]
            try:
                mask = run_lengths(segmentation, size, what)
            except ValueError as error:
                find("bad_segmentation", str(error), None)
                continue
            runs = MaskRuns.of_rle(mask)
            left, top, width, height = runs.box
            blob = Blob(runs.area, (left, top, width, height))
            if is_relative(segmentation, size):
                find("relative_polygon", f"{what}, {self.name_of(label)}: all points lie in 0..1", None)
                continue
            if blob.area == 0:
                find("empty_segment", f"{what}, {self.name_of(label)}: no pixel", None)
                continue
            self._check_numbers(annotation, blob, what, True, find)
            masks.append(runs)
            labels.segments.append(Segment(label, blob.area, bool(annotation.get("iscrowd"))))
        lost = vanished_masks(masks, size, self.training_size)
        for segment, is_lost in zip(labels.segments, lost, strict=True):
            segment.lost = is_lost
        return labels

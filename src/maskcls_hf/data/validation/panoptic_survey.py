"""Survey of COCO panoptic: the json record by record, then the PNGs against it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..coco_files import find_map_folder
from ..files import some
from .coco_survey import CocoSurvey, wrong_fields
from .files import Find, Picture, compare_sizes, read_panoptic_map
from .segments import ImageLabels, Segment, blobs, vanished
from .survey import Item


class CocoPanopticSurvey(CocoSurvey):
    """`CocoPanoptic`."""

    kind, json_kind = "panoptic", "panoptic"
    annotation_keys = ("image_id", "file_name", "segments_info")

    def _read_categories(self, categories: list[Any]) -> None:
        for category in categories:
            if category["id"] in self.classes:
                self.find("double_id", f"category id {category['id']}", self.json_path)
            self.classes[category["id"]] = str(category["name"])
            if "isthing" not in category:
                self.find("missing_isthing", f"category {category['id']}, {category['name']}", self.json_path)
            elif not category["isthing"]:
                self.stuff.add(category["id"])

    def _read_annotations(self, annotations: list[Any], images: dict[Any, Any], folder: Path | None) -> None:
        of_image: dict[Any, Any] = {}
        for annotation in annotations:
            image_id = annotation["image_id"]
            if image_id not in images:
                self.find("orphan_annotation", f"{annotation['file_name']} is of image {image_id}", self.json_path)
            elif image_id in of_image:
                self.find("double_id", f"several annotations of image {image_id}", annotation["file_name"])
            else:
                of_image[image_id] = annotation
        names = [annotation["file_name"] for annotation in of_image.values()]
        map_folder = self._folder("map_folder", names, lambda name: find_map_folder(self.json_path, name))
        for image_id, record in images.items():
            image = self._image_path(record, folder)
            annotation = of_image.get(image_id)
            label = map_folder / annotation["file_name"] if map_folder and annotation else None
            if annotation is None:
                self.find("image_without_label", "no annotation in the json", image or record["file_name"])
            elif label is not None and not label.is_file():
                self.find("image_without_label", f"no {self.shown(label)}", image or record["file_name"])
                label = None
            self.items.append(Item(image, label, (record, annotation)))
        self._note_unlisted(folder, {Path(record["file_name"]).name for record in images.values()}, "image")
        if map_folder != folder:
            self._note_unlisted(map_folder, {Path(name).name for name in names}, "map")

    def read_labels(self, item: Item, picture: Picture | None, find: Find) -> ImageLabels | None:
        record, annotation = item.record
        self._check_size(record, picture, find)
        assert item.label is not None
        ids = read_panoptic_map(item.label, find)
        if ids is None:
            return None
        height, width = ids.shape
        if picture is not None:
            compare_sizes((height, width), picture, "the label", find, "size_mismatch")
        return self._labels(ids, annotation["segments_info"], find)

    def _labels(self, ids: np.ndarray, records: list[Any], find: Find) -> ImageLabels:
        height, width = ids.shape
        found, lost = blobs(ids), vanished(ids, self.training_size)
        labels = ImageLabels((height, width), void=found[0].area if 0 in found else 0)
        listed: set[Any] = set()
        for segment in records:
            if wrong := wrong_fields(segment, ("id", "category_id")):
                find("bad_record", f"a segment: {wrong}", None)
                continue
            what = f"segment {segment['id']}"
            if segment["id"] in listed or segment["id"] == 0:
                find("double_id", f"{what}: {'0 is void' if segment['id'] == 0 else 'listed twice'}", None)
                continue
            listed.add(segment["id"])
            if segment["category_id"] not in self.classes:
                find("unknown_category", f"{what} is of category {segment['category_id']}", None)
            elif segment["id"] not in found:
                find("empty_segment", f"{what}, {self.name_of(segment['category_id'])}: no pixel in the PNG", None)
            else:
                blob = found[segment["id"]]
                self._check_numbers(segment, blob, what, False, find)
                crowd = bool(segment.get("iscrowd", 0))
                labels.segments.append(Segment(segment["category_id"], blob.area, crowd, segment["id"] in lost))
        if unlisted := sorted(set(found) - listed - {0}):
            find("ids_not_in_json", f"{len(unlisted)} ids: {some(unlisted)}", None)
        self._check_stuff(labels, find)
        return labels

    def _check_stuff(self, labels: ImageLabels, find: Find) -> None:
        stuff = Counter(s.label for s in labels.segments if s.label in self.stuff and not s.crowd)
        if twice := sorted(label for label, times in stuff.items() if times > 1):
            find("stuff_twice", some([f"{self.name_of(label)} ({stuff[label]})" for label in twice]), None)

"""Survey of COCO panoptic: the json record by record, then the PNGs against it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..coco_files import NamedFiles, find_map_folder
from ..coco_records import CocoContent
from ..files import some
from .coco_survey import CocoSurvey
from .files import Find, Picture, compare_sizes, read_panoptic_map
from .segments import ImageLabels, Segment, blobs, vanished
from .survey import Item


class CocoPanopticSurvey(CocoSurvey):
    """`CocoPanoptic`."""

    kind, json_kind = "panoptic", "panoptic"

    def _add_items(self, content: CocoContent, folder: NamedFiles | None) -> None:
        names = [annotation["file_name"] for found in content.annotations.values() for annotation in found]
        given = self.options.get("map_folder")
        maps = self._folder("map", names, lambda: find_map_folder(self.root, self.split, self.json_path, names, given))
        for image_id, record in content.images.items():
            image = self._image_path(record, folder)
            annotation = next(iter(content.annotations[image_id]), None)
            label = None
            if annotation is not None:
                where = image or record["file_name"]
                label = self._path(annotation["file_name"], maps, "image_without_label", "no map", where)
            self.items.append(Item(image, label, (record, annotation)))
        if maps is not None and (folder is None or maps.folder != folder.folder):
            self._note_unlisted(maps, {item.label.name for item in self.items if item.label is not None}, "map")

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
        return self._labels(ids, annotation, find)

    def _labels(self, ids: np.ndarray, annotation: Any, find: Find) -> ImageLabels:
        height, width = ids.shape
        found, lost = blobs(ids), vanished(ids, self.training_size)
        labels = ImageLabels((height, width), void=found[0].area if 0 in found else 0)
        for segment in annotation["segments_info"]:
            what = f"segment {segment['id']}"
            if segment["id"] not in found:
                find("empty_segment", f"{what}, {self.name_of(segment['category_id'])}: no pixel in the PNG", None)
                continue
            blob = found[segment["id"]]
            self._check_numbers(segment, blob, what, False, find)
            crowd = bool(segment.get("iscrowd"))
            labels.segments.append(Segment(segment["category_id"], blob.area, crowd, segment["id"] in lost))
        dropped = annotation["dropped"]  # refused already
        unlisted = sorted(set(found) - {segment["id"] for segment in annotation["segments_info"]} - {0, *dropped})
        if unlisted and None not in dropped:
            find("ids_not_in_json", f"{len(unlisted)} ids: {some(unlisted)}", None)
        self._check_stuff(labels, find)
        return labels

    def _check_stuff(self, labels: ImageLabels, find: Find) -> None:
        stuff = Counter(s.label for s in labels.segments if s.label in self.stuff and not s.crowd)
        if twice := sorted(label for label, times in stuff.items() if times > 1):
            find("stuff_twice", some([f"{self.name_of(label)} ({stuff[label]})" for label in twice]), None)

"""COCO panoptic: PNGs of segment ids and a json of their categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .coco_files import (
    CocoDataset,
    Packed,
    choose_json,
    find_image_folder,
    find_map_folder,
    read_coco,
    require_files,
)
from .dataset import Targets
from .files import read_coloured_ids, some, unique_ids
from .sample import VOID


class Segment(NamedTuple):
    id: int  # R + 256 G + 65536 B of its pixels
    label: int  # class
    crowd: bool
    area: int | None  # as in the json


class CocoPanoptic(CocoDataset):
    """Images with things and stuff, of COCO's panoptic format.

    Layouts: SPLIT/panoptic.json with SPLIT/panoptic and SPLIT/images; annotations/panoptic_SPLIT.json (also with a year
    behind SPLIT) with annotations/panoptic_SPLIT or panoptic_SPLIT, and SPLIT or images/SPLIT; and panoptic_NAME.json
    beside the folder panoptic_NAME. Categories with `isthing` 0 are stuff. Pixels of id 0 are void.

    Args:
        root: folder of the data.
        split: part of the names above; None where there are no splits.
        annotations: the json, below the root, where it lies elsewhere, such as "annotations/{split}.json".
        image_folder, map_folder: of images and PNGs, below the root, where they lie elsewhere, such as
            "images/{split}".
        cache: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: the json, a folder, an image or a PNG is missing.
        ValueError: the json is broken; or (on access) an image or PNG, or the PNG has ids that the json lacks. The
            message names the file.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        annotations: str | None = None,
        image_folder: str | None = None,
        map_folder: str | None = None,
        cache: bool = False,
    ):
        root = Path(root)
        path = choose_json(root, split, "panoptic", annotations)
        content = read_coco(path, "panoptic")
        files = [image["file_name"] for image in content.images.values()]
        folder = find_image_folder(root, split, path, "panoptic", files, image_folder)
        super().__init__(root, path, content, folder, content.class_names, "panoptic", content.stuff, cache)
        annotation_of = [annotation for (annotation,) in content.annotations.values()]
        names = [annotation["file_name"] for annotation in annotation_of]
        self.map_folder = find_map_folder(root, split, path, names, map_folder)
        self.map_names = require_files(root, self.map_folder, names, f"panoptic maps of {path}")
        self._segments = Packed([self._segment(s) for s in a["segments_info"]] for a in annotation_of)

    def _segment(self, segment: Any) -> tuple:
        label = self.class_of_label[segment["category_id"]]
        return (segment["id"], label, bool(segment.get("iscrowd")), segment.get("area"))

    def segments(self, index: int) -> list[Segment]:
        """Segments of an image, in the order of the json."""
        return [Segment(*fields) for fields in self._segments[index]]

    def map_path(self, index: int) -> Path:
        return self.map_folder / self.map_names[index]

    def annotation(self, index: int) -> str:
        return str(self.map_path(index))

    def raw_map(self, index: int) -> Tensor:
        return read_coloured_ids(self.map_path(index))

    def _read_targets(self, index: int, size: tuple[int, int]) -> Targets:
        self.check_record(index, size)
        ids = self.raw_map(index)
        segments = self.segments(index)
        classes: dict[int, int | None] = {0: VOID, **{segment.id: segment.label for segment in segments}}
        if unknown := [segment for segment in unique_ids(ids) if segment not in classes]:
            raise ValueError(
                f"{self.map_path(index)} has {len(unknown)} segment ids that {self.json_path} does not list: "
                f"{some(unknown)}."
            )
        return Targets(ids, classes, [segment.id for segment in segments if segment.crowd])

"""COCO panoptic: PNGs of segment ids and a json of their categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .coco_files import (
    CocoDataset,
    Packed,
    find_image_folder,
    find_map_folder,
    read_coco,
    require_files,
    require_json,
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

    Layouts: SPLIT/panoptic.json with SPLIT/panoptic and SPLIT/images; annotations/panoptic_SPLIT.json with
    annotations/panoptic_SPLIT or panoptic_SPLIT, and SPLIT or images/SPLIT; and panoptic_NAME.json beside the folder
    panoptic_NAME. Categories with `isthing` 0 are stuff. Pixels of id 0 are void.

    Args:
        root: folder of the data.
        split: part of the names above; None where there are no splits.
        annotations: the json, below the root, where it lies elsewhere.
        image_folder, map_folder: of images and PNGs, below the root, where they lie elsewhere.
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
        path = root / annotations if annotations else require_json(root, split, "panoptic")
        content = read_coco(path)
        names, stuff = _categories(path, content["categories"])
        first = content["images"][0]["file_name"] if content["images"] else ""
        folder = root / image_folder if image_folder else find_image_folder(root, split, path, first)
        super().__init__(path, content, folder, names, "panoptic", stuff, cache)
        annotation_of = self._one_each(content["annotations"])
        self.map_names = [str(annotation["file_name"]) for annotation in annotation_of]
        self.map_folder = root / map_folder if map_folder else find_map_folder(path, self.map_names[0])
        require_files(self.map_folder, self.map_names, f"panoptic maps of {path}")
        used = {segment["category_id"] for annotation in annotation_of for segment in annotation["segments_info"]}
        self.check_categories(used, names)
        self._segments = Packed([self._segment(s) for s in a["segments_info"]] for a in annotation_of)

    def _one_each(self, annotations: list[Any]) -> list[Any]:
        for annotation in annotations:
            if missing := [key for key in ("image_id", "file_name", "segments_info") if key not in annotation]:
                raise ValueError(
                    f"{self.json_path}: an annotation has no {', '.join(missing)}, so this is no panoptic file: "
                    f"{str(annotation)[:80]}"
                )
        of_image = self.grouped(annotations)
        if wrong := [self.file_names[i] for i, found in enumerate(of_image.values()) if len(found) != 1]:
            raise ValueError(
                f"{self.json_path}: each image has one panoptic annotation, {len(wrong)} have none or several: "
                f"{some(wrong)}."
            )
        return [of_image[image_id][0] for image_id in self.image_ids]

    def _segment(self, segment: Any) -> tuple:
        label = self.class_of_label[segment["category_id"]]
        return (segment["id"], label, bool(segment.get("iscrowd", 0)), segment.get("area"))

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
        ids = self.raw_map(index)
        segments = self.segments(index)
        classes: dict[int, int | None] = {0: VOID, **{segment.id: segment.label for segment in segments}}
        if len(classes) <= len(segments):
            raise ValueError(f"{self.json_path}: segments of {self.map_path(index)} share an id, or have id 0 (void).")
        if unknown := [segment for segment in unique_ids(ids) if segment not in classes]:
            raise ValueError(
                f"{self.map_path(index)} has {len(unknown)} segment ids that {self.json_path} does not list: "
                f"{some(unknown)}."
            )
        return Targets(ids, classes, [segment.id for segment in segments if segment.crowd])


def _categories(path: Path, categories: list[Any]) -> tuple[dict[int, str], list[int]]:
    """Names by category id, and the ids that are stuff."""
    if without := [str(category["name"]) for category in categories if "isthing" not in category]:
        raise ValueError(
            f"{path}: categories without isthing: {some(without)}. A panoptic file says of each category whether it "
            "is a thing (1) or stuff (0)."
        )
    names = {int(category["id"]): str(category["name"]) for category in categories}
    return names, [int(category["id"]) for category in categories if not category["isthing"]]

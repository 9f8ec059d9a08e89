"""COCO panoptic: PNGs of segment ids and a json of their categories."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ...models.run_lengths import Runs
from ..checks import Checked, CheckedSegment, Picture, ReportFault, compare_sizes, refuse, regions
from ..files import read_colored_ids, some, unique_ids
from ..sample import VOID, Segments
from .coco import CocoDataset, Packed, check_numbers
from .label_maps import read_label


class _Segment(NamedTuple):
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
        image_folder: of the images, below the root, where they lie elsewhere, such as "images/{split}".
        map_folder: of the PNGs, likewise.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: the json, a folder, an image or a PNG is missing.
        ValueError: the json is broken; or (on access) an image or PNG, or the PNG has ids that the json lacks. The
            message names the file.
    """

    json_kind = "panoptic"

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        annotations: str | None = None,
        image_folder: str | None = None,
        map_folder: str | None = None,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        content = self._open(root, split, annotations, report)
        super().__init__(content, content.class_names, "panoptic", content.stuff, image_folder, cache, report)
        annotation_of = [next(iter(found), None) for found in content.annotations.values()]
        listed = ["" if annotation is None else annotation["file_name"] for annotation in annotation_of]

        def fault(place: int, said: str, folder: Path) -> tuple[str, str, Path | str]:
            return "image_without_label", f"no map {said}", self.image_path(place) or self.file_names[place]

        beside, name = self.json_path.parent, self.json_path.stem
        folders = [beside / name, beside.parent / name, beside / "panoptic", beside / "annotations"]
        self.map_folder, self.map_names = self._files("panoptic map", listed, map_folder, folders, fault, report)
        self._segments = Packed([self._segment(s) for s in a["segments_info"]] if a else [] for a in annotation_of)
        self._records = annotation_of if report is not refuse else []  # whole, for a check alone

    def _segment(self, segment: Any) -> tuple[Any, ...]:
        label = self.class_of_label[segment["category_id"]]
        return (segment["id"], label, bool(segment.get("iscrowd")), segment.get("area"))

    def segments_info(self, index: int) -> list[_Segment]:
        """Records of the segments of an image, in the order of the json."""
        return [_Segment(*fields) for fields in self._segments[index]]

    def label_path(self, index: int) -> Path | None:
        """PNG of an image; None where it is missing, which only a check lets pass."""
        name = self.map_names[index]
        return None if name is None else self.map_folder / name

    def is_labeled(self, index: int) -> bool:
        """Whether the PNG is there."""
        return self.map_names[index] is not None

    def annotation(self, index: int) -> str:
        """Path of the PNG."""
        return str(self.label_path(index))

    def raw_map(self, index: int) -> Tensor:
        """The segment ids (H, W) of the PNG, R + 256 G + 65536 B."""
        return read_colored_ids(self.label_path(index))

    def read(self, index: int, size: tuple[int, int]) -> Segments:
        """Segments of an image; their ids are those of the PNG."""
        self.require_size(index, size)
        runs = Runs.of(self.raw_map(index).numpy())
        infos = sorted(self.segments_info(index))
        classes: dict[int, int | None] = {0: VOID, **{segment.id: segment.label for segment in infos}}
        if unknown := [segment for segment in unique_ids(runs) if segment not in classes]:
            raise ValueError(
                f"{self.label_path(index)} has {len(unknown)} segment ids that {self.json_path} does not list: "
                f"{some(unknown)}."
            )
        return Segments.from_ids(runs, classes, [segment.id for segment in infos if segment.crowd])

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """Compares PNG and json: ids, areas, boxes, and stuff that is in several segments."""
        self.check_size(index, picture, report)
        path, annotation = self.label_path(index), self._records[index]
        read = path and read_label(path, read_colored_ids, _wrong_channels, report)
        if not read or annotation is None:
            return None
        _, ids = read
        compare_sizes(ids.shape, picture, "the label", "size_mismatch", report)
        found = regions(ids)
        checked = Checked(ids.shape, ids, void=found[0].area if 0 in found else 0)
        segments = [_Segment(*self._segment(record)) for record in annotation["segments_info"]]
        for record, segment in zip(annotation["segments_info"], segments, strict=True):
            what, label = f"segment {segment.id}", self.label_ids[segment.label]
            if segment.id not in found:
                report("empty_segment", f"{what}, {self.class_names[label]}: no pixel in the PNG")
                continue
            check_numbers(record, found[segment.id], what, False, report)
            checked.segments.append(CheckedSegment(label, found[segment.id].area, segment.crowd, segment.id))
        dropped = annotation["dropped"]  # reported already
        unlisted = sorted(set(found) - {segment.id for segment in segments} - {0, *dropped})
        if unlisted and None not in dropped:
            report("ids_not_in_json", f"{len(unlisted)} ids: {some(unlisted)}")
        stuff = Counter(
            s.label for s in checked.segments if self.class_of_label[s.label] in self.stuff_ids and not s.crowd
        )
        if twice := sorted(label for label, times in stuff.items() if times > 1):
            report("stuff_twice", some([f"{self.class_names[label]} ({stuff[label]})" for label in twice]))
        return checked


def _wrong_channels(image: Image.Image) -> tuple[str, str] | None:
    return None if image.mode == "RGB" else ("gray_panoptic", f"mode {image.mode}, {len(image.getbands())} channels")

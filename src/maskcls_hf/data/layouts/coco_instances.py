"""COCO instances: polygons and run lengths of a json, drawn on access."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ...models.run_lengths import MaskRuns
from ..checks import Checked, CheckedSegment, Picture, Region, ReportFault, refuse
from ..files import shown
from ..sample import VOID, Segments
from .coco import CocoDataset, Packed, check_numbers
from .coco_records import CocoContent, is_number
from .drawing import RunLengths, box_points, run_lengths, turned

logger = logging.get_logger(__name__)

_MOST_UNSEEN = 2**26  # pixels of an image that cannot be read: masks of more are not drawn, as the json alone says so


class _Instance(NamedTuple):
    id: Any
    label: int  # class
    crowd: bool
    segmentation: Any  # as in the json
    area: float | None


class CocoInstances(CocoDataset):
    """Images with instances of things, of COCO's instance format.

    Layouts: SPLIT/instances.json with SPLIT/images; annotations/instances_SPLIT.json (also with a year behind SPLIT),
    annotations/SPLIT.json or SPLIT.json with SPLIT or images/SPLIT; SPLIT/_annotations.coco.json with the images
    beside it. Masks are polygons, run lengths or compressed run lengths, drawn by pycocotools on access. The id
    of a segment is the place of its instance in the json, from 1. An instance whose mask has no pixel is no target, and
    not found.

    Args:
        root: folder of the data.
        split: part of the names above; None where there are no splits.
        annotations: the json, below the root, where it lies elsewhere, such as "annotations/{split}.json".
        image_folder: of the images, below the root, where they lie elsewhere, such as "images/{split}".
        background: what pixels of no instance are: "negatives" (in no segment), "void" (unlabeled), or "class" (one
            segment of stuff of class 0).
        boxes: whether annotations that are boxes alone become masks; else they are skipped.
        background_name: of that class.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: the json, the folder or an image is missing.
        ValueError: the json is broken; or (on access) an image, polygon or mask. The message names file and id.
    """

    json_kind = "instances"
    expects_things = True

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        annotations: str | None = None,
        image_folder: str | None = None,
        background: Literal["negatives", "void", "class"] = "negatives",
        background_name: str = "background",
        boxes: bool = False,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        if background not in ("negatives", "void", "class"):
            raise ValueError(f'background={background!r}: needs "negatives", "void" or "class".')
        if not isinstance(background_name, str) or not background_name:
            raise ValueError(f"background_name={background_name!r}: needs a text.")
        content = self._open(root, split, annotations, report)
        skipped = Counter[str]()
        for image_id, found in content.annotations.items():
            content.annotations[image_id] = [
                annotation for annotation in found if self._has_mask(annotation, boxes, skipped, report)
            ]
        if skipped and report is refuse:
            reasons = ", ".join(f"{number} ({why})" for why, number in sorted(skipped.items()))
            logger.warning(f"{self.json_path}: not read: {reasons}. `maskcls validate` names them.")
        names, stuff = dict(content.class_names), []
        if background == "class":
            stuff = [min(names, default=1) - 1]
            names[stuff[0]] = background_name
        kind: Literal["panoptic", "instance"] = "panoptic" if background == "class" else "instance"
        super().__init__(content, names, kind, stuff, image_folder, cache, report)
        self._background: int | None = {"negatives": None, "void": VOID, "class": 0}[background]
        if report is not refuse:  # a check needs whole records
            self._records = list(content.annotations.values())
            return
        try:
            self._instances = Packed([self._instance(a) for a in found] for found in content.annotations.values())
        except RecursionError:
            raise ValueError(
                f"{self.json_path}: a segmentation is nested too deeply; `maskcls validate` names it."
            ) from None
        if _all_relative(content, self._sizes):
            warning = "all polygons lie in 0..1. They are read as pixels: multiply them by the image's size."
            logger.warning(f"{self.json_path}: {warning}")

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The usual places of the split's json, and those of labeling tools."""
        more = ["_annotations.coco.json", "result.json"]  # the latter is Label Studio's
        if split:
            names = [split, "valid"] if split == "val" else [split]
            more = [f"{name}/_annotations.coco.json" for name in names]
            more += [f"annotations/{split}.json", f"{split}.json"]
        return [*super().places(root, split), *(root / name for name in more)]

    def _has_mask(self, annotation: dict[str, Any], boxes: bool, skipped: Counter[str], report: ReportFault) -> bool:
        """Whether an annotation is more than a box; tools' forms of `segmentation` become COCO's."""
        found = annotation.get("segmentation")
        if isinstance(found, dict) or found and not isinstance(found, list):
            return True
        found = found or []
        found = [found] if found and all(map(is_number, found)) else found
        parts = [part for part in found if part != []]
        kept = [part for part in parts if not (isinstance(part, list) and len(part) in (2, 4))]  # these have no area
        annotation["segmentation"] = kept
        if kept:
            return True
        box, why = annotation.get("bbox"), "a polygon of two points" if parts else "a box alone"
        is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) > 0
        if boxes and is_box:
            annotation["segmentation"] = [_box_polygon(box, annotation.get("attributes"))]
            return True
        skipped[why] += 1
        report("box_only", f"annotation {shown(annotation.get('id'))}: {why}", self.json_path)
        return False

    def _instance(self, annotation: Any) -> tuple[Any, ...]:
        """As a plain tuple: fewer bytes."""
        label = self.class_of_label[annotation["category_id"]]
        crowd = bool(annotation.get("iscrowd")) and not _is_brush(annotation)
        return (annotation.get("id"), label, crowd, annotation.get("segmentation"), annotation.get("area"))

    def instances(self, index: int) -> list[_Instance]:
        """Annotations of an image, in the order of the json."""
        return [_Instance(*fields) for fields in self._instances[index]]

    def annotation(self, index: int) -> str:
        """The record of the image."""
        return self.record(index)

    def run_lengths(self, index: int) -> list[RunLengths]:
        """Mask of each annotation of an image, as compressed run lengths of pycocotools."""
        return [self._mask(index, instance) for instance in self.instances(index)]

    def _mask(self, index: int, instance: _Instance) -> RunLengths:
        where = f"{self.record(index)}, annotation {shown(instance.id)}"
        return run_lengths(instance.segmentation, self._sizes[index], where)

    def read(self, index: int, size: tuple[int, int]) -> Segments:
        """Segments of an image, and of its background as `background` says."""
        self.require_size(index, size)
        instances, ids = self.instances(index), list(range(1, len(self._instances[index]) + 1))
        masks, void = [MaskRuns.of_rle(mask) for mask in self.run_lengths(index)], None
        if self._background is not None:
            free = ~MaskRuns.union(masks).dense() if masks else np.ones(size, dtype=bool)
            if self._background == VOID:
                void = torch.from_numpy(free)
            elif free.any():
                instances = [_Instance(None, self._background, False, None, None), *instances]
                masks, ids = [*MaskRuns.of_masks(free[None]), *masks], [0, *ids]
        areas = [math.nan if i.area is None else float(i.area) for i in instances]
        segments = Segments(
            torch.tensor([i.label for i in instances], dtype=torch.int64),
            masks,
            torch.tensor([i.crowd for i in instances], dtype=torch.bool),
            None if all(map(math.isnan, areas)) else torch.tensor(areas, dtype=torch.float64),
            ids=ids,
            size=self._sizes[index],
            void=void,
        )
        return segments if segments.overlap else replace(segments, masks=segments.index_map, void=None)

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """Draws each mask by itself, and compares it with area and box of its record."""
        size = self.check_size(index, picture, report)
        if picture is None and size[0] * size[1] > _MOST_UNSEEN:
            return None
        checked = Checked(size)
        for annotation in self._records[index]:
            instance = _Instance(*self._instance(annotation))
            what, name = f"annotation {shown(instance.id)}", self.class_names[annotation["category_id"]]
            try:
                mask = MaskRuns.of_rle(run_lengths(instance.segmentation, size, what))
            except ValueError as error:
                report("bad_segmentation", str(error))
                continue
            if _is_relative(instance.segmentation, size):
                report("relative_polygon", f"{what}, {name}: all points lie in 0..1")
            elif mask.area == 0:
                report("empty_segment", f"{what}, {name}: no pixel")
            else:
                check_numbers(annotation, Region(mask.area, mask.box), what, True, report)
                label, place = annotation["category_id"], len(checked.masks)
                checked.segments.append(CheckedSegment(label, mask.area, instance.crowd, place))
                checked.masks.append(mask)
        return checked


def _is_brush(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation is a mask of CVAT's brush, which is an object but exported as a crowd."""
    attributes, segmentation = annotation.get("attributes"), annotation.get("segmentation")
    is_cvat = isinstance(attributes, dict) and "occluded" in attributes
    return is_cvat and isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list)


def _box_polygon(box: Any, attributes: Any) -> list[float]:
    """Corners of a box [left, top, width, height], which CVAT may have turned clockwise about its center."""
    left, top, width, height = map(float, box)
    degrees = attributes.get("rotation", 0) if isinstance(attributes, dict) else 0
    corners = box_points(left, top, left + width, top + height)
    return turned(corners, degrees if is_number(degrees) else 0, (left + width / 2, top + height / 2))


def _all_relative(content: CocoContent, sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether there are polygons, and all of them lie in 0..1."""
    of_image = zip(sizes, content.annotations.values(), strict=True)
    pairs = ((size, annotation) for size, found in of_image for annotation in found)
    return any(content.annotations.values()) and all(
        _is_relative(annotation.get("segmentation"), size) for size, annotation in pairs
    )


def _is_relative(segmentation: Any, size: tuple[int, int]) -> bool:
    """Whether all points of polygons lie in 0..1: parts of an image of `size` (height, width), not pixels."""
    if not isinstance(segmentation, list) or not segmentation or max(size) <= 2:
        return False
    return all(
        isinstance(polygon, list) and polygon and all(is_number(number) and 0 <= number <= 1 for number in polygon)
        for polygon in segmentation
    )

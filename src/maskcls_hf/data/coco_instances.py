"""COCO instances: polygons and run lengths of a json, drawn on access."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask

from .coco_files import CocoDataset, Packed, find_image_folder, read_coco, require_json
from .dataset import Targets
from .sample import VOID

FARTHEST = 1e5  # pixels; polygon points beyond it are faults, and would take pycocotools much memory

RunLengths = dict[str, Any]  # as pycocotools: `size` [height, width] and `counts`, bytes


class Instance(NamedTuple):
    id: Any
    label: int  # class
    crowd: bool
    segmentation: Any  # as in the json
    area: float | None


class CocoInstances(CocoDataset):
    """Images with instances of things, of COCO's instance format.

    Layouts: SPLIT/instances.json with SPLIT/images; annotations/instances_SPLIT.json with SPLIT or images/SPLIT;
    SPLIT/_annotations.coco.json with the images beside it. Masks are polygons, run lengths or compressed run
    lengths, drawn by pycocotools on access. Where they overlap the targets are a stack of masks, else a map with the
    place of each instance in the json, from 1. An instance whose mask has no pixel is no target, and not found.

    Args:
        root: folder of the data.
        split: part of the names above; None where there are no splits.
        annotations: the json, below the root, where it lies elsewhere.
        image_folder: of the images, below the root, where they lie elsewhere.
        background: what pixels of no instance are: "negatives" (in no segment), "void" (unlabelled), or "class" (one
            segment of stuff of class 0).
        background_name: of that class.
        cache: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: the json, the folder or an image is missing.
        ValueError: the json is broken; or (on access) an image, polygon or mask. The message names file and id.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        annotations: str | None = None,
        image_folder: str | None = None,
        background: Literal["negatives", "void", "class"] = "negatives",
        background_name: str = "background",
        cache: bool = False,
    ):
        if background not in ("negatives", "void", "class"):
            raise ValueError(f'background={background!r}: needs "negatives", "void" or "class".')
        root = Path(root)
        path = root / annotations if annotations else require_json(root, split, "instances")
        content = read_coco(path)
        categories = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        names, stuff = dict(categories), []
        if background == "class":
            stuff = [min(categories, default=1) - 1]
            names[stuff[0]] = background_name
        first = content["images"][0]["file_name"] if content["images"] else ""
        folder = root / image_folder if image_folder else find_image_folder(root, split, path, first)
        kind: Literal["panoptic", "instance"] = "panoptic" if background == "class" else "instance"
        super().__init__(path, content, folder, names, kind, stuff, cache)
        self.check_categories((a["category_id"] for a in content["annotations"]), categories)
        self._background: int | None = {"negatives": None, "void": VOID, "class": 0}[background]
        of_image = self.grouped(content["annotations"])
        self._instances = Packed([self._instance(a) for a in of_image[image_id]] for image_id in self.image_ids)

    def _instance(self, annotation: Any) -> tuple:
        """As a plain tuple: fewer bytes."""
        label = self.class_of_label[annotation["category_id"]]
        crowd = bool(annotation.get("iscrowd", 0))
        return (annotation.get("id"), label, crowd, annotation.get("segmentation"), annotation.get("area"))

    def instances(self, index: int) -> list[Instance]:
        """Annotations of an image, in the order of the json."""
        return [Instance(*fields) for fields in self._instances[index]]

    def annotation(self, index: int) -> str:
        return f"{self.json_path}, image {self.image_ids[index]} ({self.file_names[index]})"

    def run_lengths(self, index: int) -> list[RunLengths]:
        """Mask of each annotation of an image, as compressed run lengths of pycocotools."""
        where = self.annotation(index)
        size = self._sizes[index]
        return [
            run_lengths(instance.segmentation, size, f"{where}, annotation {instance.id}")
            for instance in self.instances(index)
        ]

    def _read_targets(self, index: int, size: tuple[int, int]) -> Targets:
        instances, masks = self.instances(index), self.run_lengths(index)
        ids = painted(masks, self._sizes[index])
        if ids is None:
            stack = decoded_stack(masks, self._sizes[index])
            classes: dict[int, int | None] = {place: i.label for place, i in enumerate(instances)}
            background = ~stack.any(0, keepdim=True)
            if self._background is not None and bool(background.any()):  # without a pixel it is nothing to be found
                classes[len(masks)] = self._background
                stack = torch.cat([stack, background])
            return Targets(stack, classes, *_crowd_and_areas(enumerate(instances)))
        classes = {0: self._background} if bool((ids == 0).any()) else {}
        classes |= {place: i.label for place, i in enumerate(instances, start=1)}
        return Targets(ids, classes, *_crowd_and_areas(enumerate(instances, start=1)))


def _crowd_and_areas(instances: Iterable[tuple[int, Instance]]) -> tuple[list[int], dict[int, float]]:
    """Of instances with their places."""
    placed = list(instances)
    areas = {place: float(instance.area) for place, instance in placed if instance.area is not None}
    return [place for place, instance in placed if instance.crowd], areas


def run_lengths(segmentation: Any, size: tuple[int, int], where: str) -> RunLengths:
    """The `segmentation` of an annotation -> compressed run lengths of an image of `size` (height, width).

    Raises:
        ValueError: no polygon, a polygon with too few or impossible points, run lengths of another size.
    """
    height, width = size
    if isinstance(segmentation, dict):
        return _checked_run_lengths(segmentation, size, where)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{where} has no segmentation (a box only?), got {str(segmentation)[:80]}.")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where}: a polygon is a list [x1, y1, x2, y2, x3, y3, ...] of three points or more, "
                f"got {str(polygon)[:80]}."
            )
        if not all(isinstance(number, (int, float)) and abs(number) < FARTHEST for number in polygon):  # NaN neither
            raise ValueError(
                f"{where}: a polygon has points that are no numbers or far outside the image of {width} x {height}."
            )
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))


def _checked_run_lengths(segmentation: RunLengths, size: tuple[int, int], where: str) -> RunLengths:
    own_size, counts = segmentation.get("size"), segmentation.get("counts")
    if own_size is None or tuple(own_size) != size:
        raise ValueError(f"{where}: run lengths of size {own_size}, the image is {list(size)} (height, width).")
    if isinstance(counts, list):
        if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
            raise ValueError(f"{where}: run lengths cover {sum(counts)} pixels, the image has {size[0] * size[1]}.")
        return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"{where}: run lengths without counts: {str(segmentation)[:80]}.")
    counts = counts.encode() if isinstance(counts, str) else counts
    if (covered := _covered_pixels(counts)) != size[0] * size[1]:
        raise ValueError(f"{where}: run lengths cover {covered} pixels, the image has {size[0] * size[1]}.")
    return {"size": list(size), "counts": counts}


def _covered_pixels(counts: bytes) -> int:
    """Sum of compressed run lengths, which pycocotools does not check; -1 where they are broken.

    Each number is written in digits of 5 bits, lowest first, as characters from "0" on; 32 says that more digits
    follow, 16 in the last one that it is negative. From the fourth number on it is the difference to the last but one.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return -1
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 30:
        return -1
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, 1 << shifts[ends] + 5, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else -1


def painted(masks: list[RunLengths], size: tuple[int, int]) -> torch.Tensor | None:
    """Map (H, W) int32 with the place of each mask, from 1; None where masks overlap."""
    ids = np.zeros(size, dtype=np.int32)
    for place, mask in enumerate(masks, start=1):
        left, top, width, height = (int(number) for number in coco_mask.toBbox(mask))
        window = np.s_[top : top + height, left : left + width]
        inside = coco_mask.decode(mask)[window].view(bool)
        if (ids[window][inside] != 0).any():
            return None
        ids[window][inside] = place
    return torch.from_numpy(ids)


def decoded_stack(masks: list[RunLengths], size: tuple[int, int]) -> torch.Tensor:
    """(M, H, W) bool."""
    stack = torch.zeros((len(masks), *size), dtype=torch.bool)
    for place, mask in enumerate(masks):
        stack[place] = torch.from_numpy(coco_mask.decode(mask).view(bool))
    return stack

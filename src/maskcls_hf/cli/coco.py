"""Results as files: maps as PNG, records in COCO's formats."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..utils.tasks import Task
from ..visual.drawing import Color, color_map, distinct_colors

if TYPE_CHECKING:
    from ..models.run_lengths import MaskRuns
    from ..models.segments import Segments


def map_image(result: Segments, task: Task, colors: Sequence[Color], num_labels: int) -> Image.Image:
    """The map as PNG content.

    Semantic: class ids, 8 bits, or 16 where there are more than 256 classes. Panoptic: COCO's colors, whose
    R + 256 G + 65536 B is the id of the segment, black for none. Instance: the same; see the JSON for the parts of
    instances that others hide.

    Args:
        result: segments of an image.
        task: that they are the result of.
        colors: of each segment; semantic maps have none.
        num_labels: classes of the model.
    """
    if task == "semantic":
        return Image.fromarray(result.semantic_map().numpy().astype(np.uint8 if num_labels <= 256 else np.uint16))
    return Image.fromarray(color_map(result.index_map.numpy(), result.records, colors))


def color_id(color: Color) -> int:
    """The id that COCO reads from a pixel of a panoptic PNG.

    Examples:
        >>> color_id((7, 1, 0))
        263
    """
    red, green, blue = color
    return red + 256 * green + 65536 * blue


def coco_content(records: Iterable[dict[str, Any]], categories: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Records of [`CocoRecords`] as COCO has them: images and annotations with running numbers."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(records, start=1):
        images.append({"id": number} | {key: value for key, value in record["image"].items() if key != "id"})
        for annotation in record["annotations"]:
            annotation = annotation | {"image_id": number}
            annotations.append(annotation | {"id": len(annotations) + 1} if "id" in annotation else annotation)
    return dict(images=images, annotations=annotations, categories=categories)


class CocoRecords:
    """The records of images for the JSON of a run, and its `categories`. Category ids are the model's class ids.

    Panoptic: COCO's panoptic annotations, with scores. Instance: COCO's results, one RLE each, whose list
    `annotations` is what `pycocotools`' `loadRes` takes. Semantic: areas in pixels of the classes in each image. All
    have boxes, and centroids, which COCO has not.

    Args:
        task: of the run.
        names: of the model's classes.
        stuff: classes without instances.
    """

    def __init__(self, task: Task, names: dict[int, str], stuff: Collection[int]):
        self.task = task
        self.categories: list[dict[str, Any]] = [
            dict(id=label, name=name, color=list(color))
            for (label, name), color in zip(sorted(names.items()), distinct_colors(), strict=False)
        ]
        if task == "panoptic":
            self.categories = [category | {"isthing": int(category["id"] not in stuff)} for category in self.categories]

    def of(self, map_name: str, result: Segments, colors: Sequence[Color]) -> dict[str, Any]:
        """`image` and `annotations` of one image, without the ids that they get among others.

        Args:
            map_name: file of its map.
            result: its segments.
            colors: of each segment.
        """
        height, width = result.size
        of_segments = {"semantic": self.areas, "panoptic": self.segments, "instance": self.instances}
        annotations = of_segments[self.task](result, colors)
        if self.task != "instance":
            annotations = [dict(image_id=0, file_name=map_name, segments_info=annotations)]
        return {"image": dict(id=0, file_name="", height=height, width=width), "annotations": annotations}

    @staticmethod
    def areas(result: Segments, colors: Sequence[Color]) -> list[dict[str, Any]]:
        """Records of semantic maps: area, and its part of the image, of each class."""
        pixels = math.prod(result.size)
        return [
            dict(category_id=record["label_id"], area=record["area"], fraction=record["area"] / pixels) | _place(mask)
            for record, mask in zip(result.records, result.mask_runs, strict=True)
        ]

    @staticmethod
    def instances(result: Segments, colors: Sequence[Color]) -> list[dict[str, Any]]:
        """Records of instances: score, area and run lengths of each."""
        return [
            dict(id=0, image_id=0) | _annotation(record, mask) | dict(segmentation=mask.rle())
            for record, mask in zip(result.records, result.mask_runs, strict=True)
        ]

    @staticmethod
    def segments(result: Segments, colors: Sequence[Color]) -> list[dict[str, Any]]:
        """Records of panoptic maps: color id, score and area of each segment."""
        return [
            dict(id=color_id(color)) | _annotation(record, mask)
            for record, mask, color in zip(result.records, result.mask_runs, colors, strict=True)
        ]


def _annotation(record: dict[str, Any], mask: MaskRuns) -> dict[str, Any]:
    return dict(category_id=record["label_id"], score=record["score"], area=record["area"], iscrowd=0) | _place(mask)


def _place(mask: MaskRuns) -> dict[str, Any]:
    """In pixels from the upper left corner of the image, x first: [left, top, width, height] and [x, y]."""
    x, y = mask.centroid or (0.0, 0.0)
    return dict(bbox=mask.box, centroid=[round(x, 2), round(y, 2)])

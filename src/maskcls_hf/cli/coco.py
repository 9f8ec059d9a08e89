"""Results as files: maps as PNG, records in COCO's formats."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ..utils.tasks import Task
from ..visual.drawing import Color, color_map, distinct_colors

if TYPE_CHECKING:
    from .segmenter import SegmentedImage


def map_image(result: SegmentedImage, task: Task, colors: Sequence[Color], num_labels: int) -> Image.Image:
    """The map as PNG content.

    Semantic: class ids, 8 bits, or 16 where there are more than 256 classes. Panoptic: COCO's colors, whose
    R + 256 G + 65536 B is the id of the segment, black for none. Instance: the same; see the JSON for the parts of
    instances that others hide.
    """
    if task == "semantic":
        return Image.fromarray(result.ids.astype(np.uint8 if num_labels <= 256 else np.uint16))
    return Image.fromarray(color_map(result.ids, result.segments, colors))


def color_id(color: Color) -> int:
    """The id that COCO reads from a pixel of a panoptic PNG."""
    red, green, blue = color
    return red + 256 * green + 65536 * blue


def boxes(ids: NDArray[Any], wanted: Sequence[int]) -> list[list[int]]:
    """Smallest box around the pixels of each id in a map (H, W): left, top, width, height."""
    found = ndimage.find_objects(ids.astype(np.int32), max(wanted, default=0))
    windows = [found[number - 1] for number in wanted]
    return [[x.start, y.start, x.stop - x.start, y.stop - y.start] for y, x in windows]


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
    `annotations` is what `pycocotools`' `loadRes` takes. Semantic: areas in pixels of the classes in each image.
    """

    def __init__(self, task: Task, names: dict[int, str], stuff: Collection[int]):
        self.task = task
        self.categories: list[dict[str, Any]] = [
            dict(id=label, name=name, color=list(color))
            for (label, name), color in zip(sorted(names.items()), distinct_colors(), strict=False)
        ]
        if task == "panoptic":
            self.categories = [category | {"isthing": int(category["id"] not in stuff)} for category in self.categories]

    def of(self, map_name: str, result: SegmentedImage, colors: Sequence[Color]) -> dict[str, Any]:
        """`image` and `annotations` of one image, without the ids that they get among others."""
        height, width = result.ids.shape
        if self.task == "instance":
            annotations = [self.instance(index, result) for index in range(len(result.segments))]
        else:
            records = self.areas(result) if self.task == "semantic" else self.segments(result, colors)
            annotations = [dict(image_id=0, file_name=map_name, segments_info=records)]
        return {"image": dict(id=0, file_name="", height=height, width=width), "annotations": annotations}

    @staticmethod
    def instance(index: int, result: SegmentedImage) -> dict[str, Any]:
        segment, mask = result.segments[index], result.masks[index]
        return dict(
            id=0,
            image_id=0,
            category_id=segment["label_id"],
            score=segment["score"],
            area=segment["area"],
            bbox=mask.box,
            iscrowd=0,
            segmentation=mask.rle(),
        )

    @staticmethod
    def areas(result: SegmentedImage) -> list[dict[str, Any]]:
        return [
            dict(category_id=s["label_id"], area=s["area"], fraction=s["area"] / result.ids.size)
            for s in result.segments
        ]

    @staticmethod
    def segments(result: SegmentedImage, colors: Sequence[Color]) -> list[dict[str, Any]]:
        return [
            dict(
                id=color_id(color),
                category_id=segment["label_id"],
                score=segment["score"],
                area=segment["area"],
                bbox=box,
                iscrowd=0,
            )
            for segment, color, box in zip(
                result.segments, colors, boxes(result.ids, [s["id"] for s in result.segments]), strict=True
            )
        ]

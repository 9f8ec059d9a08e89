"""The images that a model does worst on, drawn with their annotation and what it finds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.dataset import SegmentationDataset
from ..inference import Predictor
from ..inference.evaluation import crops, model_classes
from ..inference.predictor import Task
from ..metrics import GroundTruth, InstanceF1, MeanIoU, PanopticQuality
from ..visual.drawing import Colour, LegendRow, beside, draw_overlay, segment_colours
from .model_card import Picture
from .scores import METRICS, percent

PANEL = 420  # pixels of the longer edge of a panel
GAP = 8


@dataclass
class FailureCase:
    """An image, its `score` by the metric of this name, and the picture of image, annotation and prediction."""

    name: str
    metric: str
    score: float
    picture: Image.Image

    @property
    def caption(self) -> str:
        title = METRICS[self.metric].title
        return f"{self.name}, {title} {percent(self.score)} %: image, annotation, what the model finds."


@dataclass
class Segmented:
    """A map of ids (H, W) and the records `id`, `label_id`, `area` of those that are segments."""

    ids: NDArray[Any]
    segments: list[dict[str, Any]]


def failure_cases(
    predictor: Predictor,
    data: SegmentationDataset,
    number: int = 4,
    task: Task = "semantic",
    *,
    crop: int | None = None,
    limit: int | None = None,
    on_image: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[FailureCase]:
    """The images with the lowest scores of their own, worst first: mean IoU, PQ, or F1 of instances.

    Images without a score, such as those that are all void, are left out.

    Args:
        number: of images.
        task: semantic, panoptic, or instance: the things in the panoptic map.
        crop: take the middle of each image, of so many pixels.
        limit: look at the first so many images.
        on_image: called after each image.
        options: of the image processor's post-processing, such as `threshold`.

    Raises:
        ValueError: model and data have different classes, or the model cannot do the task.
    """
    of_model = model_classes(predictor.id2label, data.id2label)
    stuff = of_model[data.stuff_ids].tolist() if data.stuff_ids else []
    map_task: Task = "semantic" if task == "semantic" else "panoptic"
    if map_task == "panoptic":
        options = {"label_ids_to_fuse": stuff, **options}
    worst: list[tuple[float, int]] = []
    metric = new_metric(task, predictor.id2label, stuff)

    def looked_at(index: int) -> tuple[Any, GroundTruth, dict[str, Any]]:
        sample = next(crops(data[index], crop, middle=True))
        truth = GroundTruth.from_sample(sample, data.void_id)
        truth.labels = of_model[truth.labels]
        found: Any = predictor(sample["image"].as_subclass(Tensor), map_task, **options)
        return sample, truth, found

    for index in range(min(limit or len(data), len(data))):
        _, truth, found = looked_at(index)
        score = score_of(metric, found, truth)
        if not math.isnan(score):
            heapq.heappush(worst, (-score, -index))
            if len(worst) > number:
                heapq.heappop(worst)
        on_image()
    cases = []
    for negative, place in sorted(worst, reverse=True):
        sample, truth, found = looked_at(-place)
        true = true_classes(truth, data.void_id) if task == "semantic" else true_segments(truth)
        predicted = Segmented(found["segmentation"].numpy(), with_areas(found))
        one_colour = list(predictor.id2label) if task == "semantic" else stuff
        picture = draw_case(pixels_of(sample["image"]), true, predicted, predictor.id2label, one_colour)
        cases.append(FailureCase(sample["name"], METRIC_OF[task], -negative, picture))
    return cases


METRIC_OF = {"semantic": "mean_iou", "panoptic": "pq", "instance": "f1"}


def new_metric(task: Task, id2label: dict[int, str], stuff: list[int]) -> Any:
    if task == "semantic":
        return MeanIoU(id2label)
    if task == "panoptic":
        return PanopticQuality(id2label, stuff)
    things = {label: name for label, name in id2label.items() if label not in stuff}
    if not things:
        raise ValueError("Every class is stuff: there are no instances.")
    return InstanceF1(things)


def score_of(metric: Any, found: dict[str, Any], truth: GroundTruth) -> float:
    """Of one image alone."""
    metric.reset()
    if isinstance(metric, MeanIoU):
        metric.update(found["segmentation"], truth)
        return metric.compute()["mean_iou"]
    if isinstance(metric, PanopticQuality):
        metric.update(found["segmentation"], found["segments_info"], truth)
        return metric.compute()["pq"]
    infos = [info for info in found["segments_info"] if info["label_id"] in metric.id2label]
    masks = found["segmentation"] == torch.tensor([info["id"] for info in infos]).view(-1, 1, 1)
    metric.update(masks, [info["label_id"] for info in infos], truth)
    return metric.compute()["f1"]


# -- pictures ----------------------------------------------------------------------------------------------------


def save_failure_cases(cases: list[FailureCase], folder: Path) -> list[Picture]:
    """Write the pictures, for [`write_model_card`]."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for place, case in enumerate(cases, start=1):
        path = folder / f"failure-{place}.jpg"
        case.picture.save(path, quality=88)
        pictures.append(Picture(path, case.caption))
    return pictures


def draw_case(
    image: NDArray[np.uint8], true: Segmented, predicted: Segmented, names: dict[int, str], one_colour: list[int]
) -> Image.Image:
    """Image (H, W, 3), its annotation and the prediction side by side, with a legend; both in the same colours."""
    panels = [Image.fromarray(image)]
    legend: dict[str, list[Colour]] = {}
    for found in (true, predicted):
        colours: list[Colour] = segment_colours(found.segments, len(names), one_colour)
        panels.append(draw_overlay(image, found.ids, found.segments, colours, names, legend=False))
        for segment, colour in zip(found.segments, colours, strict=True):
            name = names[segment["label_id"]]
            if name.lower() != "background":  # which is not drawn
                legend.setdefault(name, []).append(colour)
    factor = PANEL / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    panels = [panel.resize(size, Image.Resampling.LANCZOS) for panel in panels]
    if legend:
        rows = [LegendRow(name, list(dict.fromkeys(colours))) for name, colours in legend.items()]
        panels[-1] = beside(panels[-1], rows)
    sheet = Image.new("RGB", (2 * (size[0] + GAP) + panels[-1].width, size[1]), "white")
    for place, panel in enumerate(panels):
        sheet.paste(panel, (place * (size[0] + GAP), 0))
    return sheet


def true_segments(truth: GroundTruth) -> Segmented:
    """The annotated segments but for crowds; where they overlap, the smaller is in front."""
    ids = np.full(truth.size, -1, dtype=np.int32)
    areas = truth.masks.flatten(1).sum(1).tolist() if len(truth.labels) else []
    for place in sorted(range(len(areas)), key=lambda place: -areas[place]):
        if not truth.crowd[place]:
            ids[truth.masks[place].numpy()] = place
    records = [
        dict(id=place, label_id=int(truth.labels[place]), area=area)
        for place, area in enumerate(areas)
        if area and not truth.crowd[place]
    ]
    return Segmented(ids, records)


def true_classes(truth: GroundTruth, void_id: int) -> Segmented:
    classes = truth.semantic(void_id).numpy()
    labels, areas = np.unique(classes, return_counts=True)
    records = [
        dict(id=label, label_id=label, area=area)
        for label, area in zip(labels.tolist(), areas.tolist(), strict=True)
        if label != void_id
    ]
    return Segmented(classes, records)


def with_areas(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a result, each with its area."""
    return [
        record if "area" in record else record | {"area": int((found["segmentation"] == record["id"]).sum())}
        for record in found["segments_info"]
    ]


def pixels_of(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) on the 0..255 scale -> (H, W, 3)."""
    return image.as_subclass(Tensor).clamp(0, 255).round().byte().permute(1, 2, 0).contiguous().numpy()

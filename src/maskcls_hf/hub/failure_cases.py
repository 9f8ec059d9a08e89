"""The images that a model does worst on."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import SegmentationDataset
from ..inference import Predictor
from ..inference.evaluation import crops, model_classes
from ..inference.predictor import Task
from ..metrics import GroundTruth, InstanceF1, MeanIoU, PanopticQuality
from .case_pictures import (
    CASE,
    MAPS,
    Segmented,
    draw_case,
    draw_maps,
    pixels_of,
    true_classes,
    true_segments,
    with_areas,
)
from .model_card import Picture
from .scores import METRICS, percent


@dataclass
class FailureCase:
    """An image, its `score` by the metric of this name, and the picture of image, annotation and prediction."""

    name: str
    metric: str
    score: float
    picture: Image.Image
    shows: str

    @property
    def caption(self) -> str:
        return f"{self.name}, {METRICS[self.metric].title} {percent(self.score)} %: {self.shows}."


def failure_cases(
    predictor: Predictor,
    data: SegmentationDataset,
    number: int = 4,
    task: Task = "semantic",
    *,
    crop: int | None = None,
    limit: int | None = None,
    maps_only: bool = False,
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
        maps_only: draw neither images nor annotations, but what the model finds and where its classes are wrong.
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
        image, tasks = sample["image"].as_subclass(Tensor), {map_task: options}
        return sample, truth, predictor.predict(image, tasks, input_data_format="channels_first")[0][map_task]

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
        one_color = list(predictor.id2label) if task == "semantic" else stuff
        draw, shows = (draw_maps, MAPS) if maps_only else (draw_case, CASE)
        picture = draw(pixels_of(sample["image"]), true, predicted, predictor.id2label, one_color)
        cases.append(FailureCase(sample["name"], METRIC_OF[task], -negative, picture, shows))
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
    masks = found["segmentation"] == torch.tensor([info["id"] for info in infos], device="cpu").view(-1, 1, 1)
    metric.update(masks, [info["label_id"] for info in infos], truth)
    return metric.compute()["f1"]


def save_failure_cases(cases: list[FailureCase], folder: Path) -> list[Picture]:
    """Write the pictures, for [`write_model_card`]."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for place, case in enumerate(cases, start=1):
        path = folder / f"failure-{place}.jpg"
        case.picture.save(path, quality=88)
        pictures.append(Picture(path, case.caption))
    return pictures

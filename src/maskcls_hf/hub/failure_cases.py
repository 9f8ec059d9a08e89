"""The images that a model does worst on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.dataset import SegmentationDataset
from ..inference import Predictor
from ..inference.evaluation import crops, model_classes
from ..metrics import InstanceF1, MeanIoU, PanopticQuality, Segments
from ..utils.plain_text import percent
from ..utils.tasks import Task
from .card_options import Picture
from .case_pictures import (
    CASE,
    MAPS,
    draw_case,
    draw_maps,
    pixels_of,
    true_classes,
    true_segments,
)
from .scores import METRICS

# Metric of each task, and its score that counts.
SCORES: dict[Task, tuple[Any, str]] = {
    "semantic": (MeanIoU, "mean_iou"), "panoptic": (PanopticQuality, "pq"), "instance": (InstanceF1, "f1"),
}  # fmt: skip


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
        """Name and score of the image, and what the picture shows."""
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
        predictor: with the model.
        data: images with annotations.
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
    metric_class, score = SCORES[task]
    metric = metric_class(predictor.id2label, stuff)

    def looked_at(index: int) -> tuple[Any, Segments, dict[str, Any]]:
        sample = next(crops(data[index], crop, middle=True))
        truth = sample["segments"]
        truth = replace(truth, class_labels=of_model[truth.class_labels])
        image, tasks = sample["image"].as_subclass(Tensor), {map_task: options}
        return sample, truth, predictor.predict(image, tasks, input_data_format="channels_first")[0][map_task]

    scored: list[tuple[float, int]] = []
    for index in range(min(limit or len(data), len(data))):
        _, truth, found = looked_at(index)
        metric.reset()
        metric.update(Segments.from_output(found, truth.name), truth)
        scored.append((metric.compute()[score], index))
        on_image()
    cases = []
    for value, index in sorted(pair for pair in scored if not math.isnan(pair[0]))[:number]:
        sample, truth, found = looked_at(index)
        true = true_classes(truth, data.void_id) if task == "semantic" else true_segments(truth)
        predicted = Segments.from_output(found)
        one_color = list(predictor.id2label) if task == "semantic" else stuff
        draw, shows = (draw_maps, MAPS) if maps_only else (draw_case, CASE)
        picture = draw(pixels_of(sample["image"]), true, predicted, predictor.id2label, one_color)
        cases.append(FailureCase(truth.name, score, value, picture, shows))
    return cases


def save_failure_cases(cases: list[FailureCase], folder: str | Path) -> list[Picture]:
    """Write the pictures, for [`write_model_card`]."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for place, case in enumerate(cases, start=1):
        path = folder / f"failure-{place}.jpg"
        case.picture.save(path, quality=88)
        pictures.append(Picture(path, case.caption))
    return pictures

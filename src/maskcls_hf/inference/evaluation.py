"""Scores of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from ..data.dataset import SegmentationDataset
from ..data.sample import Sample, as_sample, without_absent
from ..metrics import Evaluator, Segments
from ..models.options import require_range
from ..utils.plain_text import printable
from .predictor import Predictor


def evaluate(
    predictor: Predictor,
    data: SegmentationDataset,
    evaluator: Evaluator,
    *,
    crop: int | None = None,
    middle: bool = False,
    limit: int | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Predict the images of `data` one after the other and score them at their own size.

    Args:
        predictor: of the model.
        data: annotated images.
        evaluator: its scores so far are forgotten. Its classes are those of the model; classes of the data are found
            among them by name.
        crop: score crops of so many pixels as images of their own, side by side in the middle of each image.
        middle: only the crop in the middle of each image.
        limit: score only the first so many images.
        on_image: called after each image.

    Returns:
        `evaluator.compute()`; `evaluator.per_class()` has the rest.

    Raises:
        ValueError: model and data have different classes, a file of the data or an option is wrong.
    """
    for name, value in (("crop", crop), ("limit", limit)):
        if value is not None:
            require_range(name, value, "[1, inf)", integer=True)
    predictor.check(evaluator.options)
    of_model = model_classes(predictor.id2label, data.id2label)
    evaluator.reset()

    def parts() -> Iterator[tuple[Tensor, Segments]]:
        for index in range(min(limit or len(data), len(data))):
            for sample in crops(data[index], crop, middle):
                truth = sample["segments"]
                yield sample["image"].as_subclass(Tensor), replace(truth, class_labels=of_model[truth.class_labels])
            on_image()

    stream = parts()
    while batch := list(islice(stream, predictor.batch_size)):
        images, truths = zip(*batch, strict=True)
        found = predictor.predict(list(images), evaluator.options, input_data_format="channels_first")
        evaluator.add(evaluator.measure_maps(found, truths))
    return evaluator.compute()


def model_classes(of_model: Mapping[int, str], of_data: Mapping[int, str]) -> Tensor:
    """For each class of the data the model's class of the same name (K,) int64.

    Raises:
        ValueError: they do not have the same names.

    Examples:
        >>> model_classes({0: "sky", 1: "road"}, {0: "road", 1: "sky"})
        tensor([1, 0])
    """
    names = [of_model[label] for label in sorted(of_model)]
    wanted = [of_data[label] for label in sorted(of_data)]
    if names == wanted:
        return torch.arange(len(names), device="cpu")
    if sorted(names) != sorted(wanted) or len(set(names)) < len(names):
        raise ValueError(
            f"The classes of the model and of the data differ.\nmodel ({len(names)}): {_listed(names)}\n"
            f"data ({len(wanted)}): {_listed(wanted)}\n"
            f"only the model has: {_listed(sorted(set(names) - set(wanted))) or '-'}\n"
            f"only the data has: {_listed(sorted(set(wanted) - set(names))) or '-'}"
        )
    place = {name: label for label, name in enumerate(names)}
    return torch.tensor([place[name] for name in wanted], device="cpu")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))


def crops(sample: Sample, size: int | None, middle: bool = False) -> Iterator[Sample]:
    """Crops of `size` x `size`, side by side in the middle of an image, or the `middle` one alone.

    A crop is as long as the image where the image is shorter.

    Args:
        sample: an image with its segments.
        size: in pixels; None: the whole image.
        middle: one crop.
    """
    if size is None:
        yield sample
        return
    image, segments = sample["image"].as_subclass(Tensor), sample["segments"]
    pixels, (height, width) = segments.pixels, segments.size
    for rows in _windows(height, size, middle):
        for columns in _windows(width, size, middle):
            window = (slice(None), rows, columns)
            name = f"{segments.name}[{rows.start}:{rows.stop}, {columns.start}:{columns.stop}]"
            yield without_absent(as_sample(image[window], segments.with_pixels(pixels[window]), name))


def _windows(length: int, size: int, middle: bool) -> list[slice]:
    step = min(size, length)
    if middle:
        return [slice((length - step) // 2, (length + step) // 2)]
    first = length % step // 2
    return [slice(start, start + step) for start in range(first, length - step + 1, step)]

"""Files of images -> the files of `maskcls segment`: reading, the network and drawing overlap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inference.loading import class_of_saved, load_image_processor
from ..inference.predictor import Predictor, same_size_together
from ..models import inference_defaults
from ..models.image_reading import autocontrast, image_to_tensor, open_image
from ..models.modeling_maskcls import PerPixelForSemanticSegmentation
from ..models.segments import Segments
from ..utils.ahead import ahead, cores, in_order
from ..utils.tasks import Task
from ..visual.drawing import draw_overlay, segment_colors
from .coco import CocoRecords, map_image
from .results import Results, png


def saved_task(name: str) -> Task:
    """What a saved model predicts where nobody says.

    Raises:
        ValueError: no model, or another kind of model.
        OSError: it has no image processor.
    """
    if class_of_saved(name) is PerPixelForSemanticSegmentation:
        return "semantic"
    task: Task = inference_defaults.saved_task(load_image_processor(name))
    return task


class Segmenter:
    """A saved model and its image processor, ready for one task.

    Args:
        name: folder or name on the Hub, of this package or of transformers' MaskFormer.
        task: "semantic", "panoptic" or "instance".
        device: where the model is moved to.
        options: arguments of the processor's `post_process_<task>_segmentation`, such as `threshold`.
        overlay: draw the segments over the images.
        inference: arguments of `Predictor`, such as `tile`.

    Raises:
        ValueError: no model, another kind of model, or one that cannot do the task.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        device: str | torch.device = "cpu",
        *,
        options: dict[str, Any],
        overlay: bool = True,
        **inference: Any,
    ):
        if task != "semantic" and class_of_saved(name) is PerPixelForSemanticSegmentation:
            raise ValueError(f"{name} classifies pixels and knows no segments: use --task semantic.")
        self.predictor = Predictor.from_pretrained(name, device, **inference)
        self.predictor.check({task: options})
        self.task, self.options, self.overlay = task, options, overlay

    @cached_property
    def settings(self) -> bytes:
        """A digest of all that results depend on beside the image: weights, configurations, options, version."""
        predictor = self.predictor
        ways = {name: getattr(predictor, name) for name in ("tile", "overlap", "enlarge")}
        config, processor = predictor.model.config.to_dict(), predictor.image_processor.to_dict()
        config.pop("_name_or_path", None)
        said = [version("maskcls-hf"), self.task, self.options, ways, config, processor]
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode())
        for name, values in predictor.model.state_dict().items():
            digest.update(name.encode())
            digest.update(values.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.digest()

    def fingerprint(self, path: Path) -> str:
        """Of a file and the settings that its results are made with."""
        stat = path.stat()
        file = f"{stat.st_size} {stat.st_mtime_ns}".encode()
        return hashlib.blake2b(self.settings + file, digest_size=12).hexdigest()

    @property
    def names(self) -> dict[int, str]:
        """Names of the model's classes."""
        return self.predictor.id2label

    @property
    def classes_of_one_segment(self) -> Sequence[int]:
        """Classes that have one segment an image: all in semantic maps, stuff in panoptic ones."""
        if self.task == "semantic":
            return list(self.names)
        return (self.predictor.image_processor.label_ids_to_fuse or []) if self.task == "panoptic" else []

    def __call__(self, images: Sequence[Any]) -> list[Segments]:
        """Segment images of any kind that the image processor takes; arrays and tensors are (C, H, W)."""
        tasks = {self.task: self.options}
        found = self.predictor.predict(list(images), tasks, input_data_format="channels_first")
        return [Segments.from_output(of_image[self.task]) for of_image in found]


class Outcome(NamedTuple):
    """What became of a file.

    Attributes:
        number: its place among the files.
        path: of the file.
        image: (3, H, W), on the 0..255 scale.
        result: its segments.
        drawn: content of its two PNG files, overlay (or None) and map, with its record.
        error: what was wrong.
    """

    number: int
    path: Path
    image: Tensor | None = None
    result: Segments | None = None
    drawn: tuple[bytes | None, bytes, dict[str, Any]] | None = None
    error: Exception | None = None

    @property
    def size(self) -> Any:
        """(height, width); None without an image."""
        return None if self.image is None else self.image.shape[-2:]


def read(numbered: tuple[int, Path]) -> Outcome:
    """An image by its number and path, or what was wrong with it."""
    number, path = numbered
    try:
        return Outcome(number, path, image_to_tensor(open_image(path)))
    except Exception as error:  # broken files raise errors of many kinds
        return Outcome(number, path, error=error)


def draw(outcome: Outcome, name: str, segmenter: Segmenter, records: CocoRecords) -> Outcome:
    """The files of an image that has a result; others stay.

    Args:
        outcome: of a file.
        name: of its files, without ending.
        segmenter: that has found the segments.
        records: makes its record.
    """
    image, result = outcome.image, outcome.result
    if image is None or result is None:
        return outcome
    try:
        fingerprint = segmenter.fingerprint(outcome.path)
        found, num_labels = result.records, len(segmenter.names)
        colors = segment_colors(found, num_labels, segmenter.classes_of_one_segment)
        shown = result if result.is_map else result.drawn(reversed(range(len(result))))  # the best on top
        overlay = None
        if segmenter.overlay:
            if getattr(segmenter.predictor.image_processor, "do_autocontrast", False):
                image = autocontrast(image)  # as the model sees it
            pixels = image.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
            overlay = png(draw_overlay(pixels, shown.index_map.numpy(), found, colors, segmenter.names))
        found_map = map_image(shown, segmenter.task, colors, num_labels)
        record = records.of(f"{name}.png", result, colors)
        record["image"]["fingerprint"] = fingerprint
        return Outcome(outcome.number, outcome.path, drawn=(overlay, png(found_map), record))
    except Exception as error:
        return Outcome(outcome.number, outcome.path, error=error)


def segment_files(
    paths: Sequence[Path], segmenter: Segmenter, results: Results, skip_existing: bool = False
) -> Generator[tuple[Path, Exception | bool]]:
    """Write the results of all files, in their order.

    Of each comes True when they are written, or what was wrong with it.

    Files are read, and results drawn, in threads; this one predicts, and writes. At any time as many images are held as
    a few batches have, and one more for each core.

    Args:
        paths: of images.
        segmenter: finds the segments.
        results: the folder.
        skip_existing: of those that have the same results already, False comes, and first.
    """
    batch_size = segmenter.predictor.batch_size
    records = CocoRecords(segmenter.task, segmenter.names, segmenter.classes_of_one_segment)
    names: dict[Path, str] = {}

    def draw_named(outcome: Outcome) -> Outcome:
        return draw(outcome, names[outcome.path], segmenter, records)

    readers = max(1, cores() // 4)
    drawers = max(1, cores() - readers)
    with results.open(records.categories):
        names |= zip(paths, results.names(paths), strict=True)
        if skip_existing:
            there = {path for path in paths if results.has(path, segmenter.fingerprint(path), segmenter.overlay)}
            yield from ((path, False) for path in paths if path in there)
            paths = [path for path in paths if path not in there]
        results.renew(paths)
        with (
            closing(ahead(read, enumerate(paths), readers, batch_size + readers)) as images,
            closing(segmented(images, segmenter, batch_size)) as found,
            closing(ahead(draw_named, found, drawers, batch_size + drawers)) as drawn,
        ):
            for outcome in in_order(drawn, lambda outcome: outcome.number):
                if outcome.drawn is not None:
                    results.add(outcome.path, names[outcome.path], *outcome.drawn)
                yield outcome.path, outcome.error or True


def segmented(images: Iterable[Outcome], segmenter: Any, batch_size: int) -> Generator[Outcome]:
    """Images with results, not always in order: images of one size go together.

    Where a batch fails, its images go one by one.

    Args:
        images: that were read, or not.
        segmenter: finds the segments.
        batch_size: images at once.
    """
    for batch in same_size_together(images, lambda image: image.size, batch_size):
        yield from of_batch([outcome for outcome in batch if outcome.image is not None], segmenter)
        yield from (outcome for outcome in batch if outcome.image is None)


def of_batch(batch: list[Outcome], segmenter: Any) -> list[Outcome]:
    """Images with results; where they fail together, one by one."""
    try:
        results = segmenter([outcome.image for outcome in batch]) if batch else []
    except Exception as error:  # what an image can do to a model is not foreseen
        if len(batch) == 1:
            return [batch[0]._replace(image=None, error=error)]
        return [outcome for one in batch for outcome in of_batch([one], segmenter)]
    return [outcome._replace(result=result) for outcome, result in zip(batch, results, strict=True)]

"""Thresholds that a model does best with, found on annotated images that it was not trained on."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import SegmentationDataset
from ..metrics import InstanceF1, PanopticQuality, Segments
from ..metrics.calibration import Calibration
from ..models.inference_defaults import NO_CLEAN_UP, defaults_of, task_options
from ..models.options import require_range
from .eval_mode import in_eval_mode
from .evaluation import model_classes
from .predictor import Predictor

TunedTask = Literal["panoptic", "instance"]
TunedMetric = Literal["pq", "f1"]
# The values that are tried of each option, in the order in which they are searched.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "panoptic": {
        "threshold": (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "overlap_mask_area_threshold": (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
        "mask_threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
    },
    "instance": {
        "threshold": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "mask_threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
    },
}
MOST_ROUNDS = 3
LOGITS = ("class_queries_logits", "masks_queries_logits")
SIZES = ("padded_sizes", "valid_sizes", "original_sizes", "patch_offsets")


@dataclass(frozen=True)
class Tuning:
    """What [`tune`] found.

    Args:
        task: "panoptic" or "instance".
        metric: "pq" or "f1".
        images: number of images that were looked at.
        options: the best values, by the names of `post_process_<task>_segmentation`.
        before: the values that the model had.
        tried: each setting that was tried, in order, with its `scores`.
        calibration: of the segments that the best setting finds.
    """

    task: TunedTask
    metric: TunedMetric
    images: int
    options: dict[str, float]
    before: dict[str, float]
    tried: list[dict[str, Any]]
    calibration: Calibration

    def scores_of(self, options: Mapping[str, float]) -> dict[str, float]:
        """Scores of a setting that was tried.

        Raises:
            StopIteration: it was not.
        """
        return next(entry["scores"] for entry in self.tried if entry["options"] == options)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: value for name, value in vars(self).items() if name != "calibration"}
        scores = dict(scores=self.scores_of(self.options), scores_before=self.scores_of(self.before))
        return found | scores | {"calibration": asdict(self.calibration)}


def tune(
    predictor: Predictor,
    data: SegmentationDataset,
    task: TunedTask = "panoptic",
    metric: TunedMetric | None = None,
    *,
    grid: Mapping[str, Sequence[float]] | None = None,
    limit: int | None = None,
    on_pass: Callable[[str, int], Callable[[], None]] = lambda what, images: lambda: None,
) -> Tuning:
    """The thresholds with the highest score, by a search along one option after the other, until no option helps.

    The model sees each image once; what post-processing needs of its outputs, without the queries that no setting
    takes, waits on the disk, so that memory holds one image. The maps are those of [`evaluate`]: in tiles where the
    predictor has some, and without the clean-up that is not saved with the model.

    Args:
        predictor: of a mask-classification model; its image processor is left as it is.
        data: annotated images, best those of validation: what is tuned on the test set can't be tested there.
        task: "panoptic"; or "instance", instances that may overlap.
        metric: "pq", PQ over all classes (panoptic), or "f1", of things at IoU 0.5 over all images. None: PQ for the
            task panoptic, F1 for instance.
        grid: values of each option to try. None: those of `GRIDS`. The search begins with the model's own.
        limit: only the first so many images.
        on_pass: called before all images are gone through, with what for and how many; what it returns is called after
            each.

    Returns:
        The best values, and all that were tried.

    Raises:
        ValueError: a per-pixel model, PQ of instances that overlap, data without instances or of other classes, an
            unknown option, or a value outside [0, 1].
    """
    metric = metric or ("pq" if task == "panoptic" else "f1")
    grid = {name: sorted(values) for name, values in (GRIDS.get(task, {}) if grid is None else grid).items()}
    _check(predictor, data, task, metric, grid)
    if limit is not None:
        require_range("limit", limit, "[1, inf)", integer=True)
    stuff = model_classes(predictor.id2label, data.id2label)[data.stuff_ids].tolist()
    measure: Any = PanopticQuality if metric == "pq" else InstanceF1
    fixed = _fixed_options(predictor, task, stuff)
    own = {name: float(fixed.pop(name)) for name in grid}
    images = min(limit or len(data), len(data))
    with tempfile.TemporaryDirectory(prefix="maskcls-tune-") as folder:
        cache = _OutputCache(predictor, Path(folder), task, fixed, min([*grid["threshold"], own["threshold"]]))
        cache.fill(data, images, on_pass("Predicting", images))
        search = Search(cache, measure(predictor.id2label, stuff_ids=stuff), metric, on_pass)
        best = search.along(own, grid)
        calibration = Calibration.of(search.outcomes(best))
    return Tuning(task, metric, images, best, own, search.tried, calibration)


def _check(
    predictor: Predictor, data: SegmentationDataset, task: str, metric: str, grid: Mapping[str, Sequence[float]]
) -> None:
    if task not in GRIDS:
        raise ValueError(f"task must be one of {', '.join(GRIDS)}, got {task!r}: other maps have no thresholds.")
    if metric not in ("pq", "f1") or (task, metric) == ("instance", "pq"):
        raise ValueError(f"metric must be f1{' or pq' if task == 'panoptic' else ''} for {task}, got {metric!r}.")
    if not predictor.finds_segments:
        raise ValueError("a per-pixel model has no thresholds to tune.")
    if not data.has_instances and (task, metric) != ("panoptic", "pq"):
        raise ValueError("the data has maps of classes, which do not tell instances apart: tune panoptic maps by pq.")
    if unknown := set(grid) - set(GRIDS[task]):
        raise ValueError(f"grid: {sorted(unknown)} are no thresholds of {task} maps, only {', '.join(GRIDS[task])}.")
    if "threshold" not in grid:
        raise ValueError("grid must have values of threshold.")
    for name, values in grid.items():
        for value in values:
            require_range(f"grid[{name!r}]", value, "[0, 1]")


def _fixed_options(predictor: Predictor, task: str, stuff: Sequence[int]) -> dict[str, Any]:
    """All options of the maps, as [`Evaluator`] has them; but of instances with a threshold."""
    saved = defaults_of(predictor.image_processor)
    return task_options(saved, task, {}, NO_CLEAN_UP[task]) | {"label_ids_to_fuse": sorted(stuff)}


class _OutputCache:
    """Annotated images with the outputs of the model in a folder, one file each; maps are made of these.

    Args:
        fixed: options of the maps that stay.
        least: no setting takes a query whose best class has a probability below this: they are left out.
    """

    def __init__(self, predictor: Predictor, folder: Path, task: TunedTask, fixed: Mapping[str, Any], least: float):
        self.folder, self.task, self.fixed, self.least = folder, task, dict(fixed), least
        self.predictor = copy.copy(predictor)
        if predictor.network is None:
            self.predictor.network = in_eval_mode(predictor.model)
        self.images = 0

    def fill(self, data: SegmentationDataset, images: int, on_image: Callable[[], None]) -> None:
        """See each image once.

        Args:
            data: annotated images.
            images: how many of them.
            on_image: called after each.
        """
        of_model = model_classes(self.predictor.id2label, data.id2label)
        see = self.predictor._outputs
        outputs: list[dict[str, Tensor]] = []

        def recorded(*arguments: Any) -> Any:
            found = see(*arguments)
            outputs.append(self._needed(found))
            return found

        self.predictor._outputs = recorded  # type: ignore[method-assign, assignment]
        for index in range(images):
            sample = data[index]
            truth = sample["segments"]
            truth = replace(truth, class_labels=of_model[truth.class_labels])
            outputs.clear()
            image = sample["image"].as_subclass(Tensor)
            self.predictor.predict([image], {self.task: self.fixed}, input_data_format="channels_first")
            entry = dict(outputs=outputs, truth=truth, shape=tuple(image.shape), dtype=image.dtype)
            torch.save(entry, self.folder / f"{index}.pt")
            on_image()
        self.images = images

    def _needed(self, outputs: Any) -> dict[str, Tensor]:
        probs = outputs.class_queries_logits.float().softmax(-1)[..., :-1]  # (B, N, K)
        kept = (probs >= self.least).any(-1).any(0).nonzero()[:, 0]
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=probs.device)
        needed = {name: getattr(outputs, name)[:, kept].cpu() for name in LOGITS}
        sizes = {name: getattr(outputs, name, None) for name in SIZES}
        return needed | {name: value.cpu() for name, value in sizes.items() if value is not None}

    def maps(self, settings: Sequence[Mapping[str, float]]) -> Iterator[tuple[Segments, list[Segments]]]:
        """For each image what is there, and what is found with each of the settings."""
        for index in range(self.images):
            entry = torch.load(self.folder / f"{index}.pt", weights_only=False)  # of our own making
            image = torch.zeros(entry["shape"], dtype=entry["dtype"])
            found = []
            for options in settings:
                outputs = iter(entry["outputs"])
                self.predictor._outputs = lambda *_, of=outputs: SimpleNamespace(**next(of))  # type: ignore[method-assign]
                tasks: Any = {self.task: {**self.fixed, **options}}
                (result,) = self.predictor.predict([image], tasks, input_data_format="channels_first")
                found.append(Segments.from_output(result[self.task], entry["truth"].name))
            yield entry["truth"], found


class Search:
    """Scores of settings on the images of a cache; `tried` has them all.

    Args:
        cache: annotated images with the outputs of the model.
        metric: is copied for each setting.
        score: of the metric, the one that is searched for.
        on_pass: see [`tune`].
    """

    def __init__(
        self,
        cache: _OutputCache,
        metric: Any,
        score: str,
        on_pass: Callable[[str, int], Callable[[], None]],
    ):
        self.cache, self.metric, self.score, self.on_pass = cache, metric, score, on_pass
        self.tried: list[dict[str, Any]] = []

    def along(self, start: Mapping[str, float], grid: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The best setting that a search along one option after the other comes to; of equal ones the first."""
        best = dict(start)
        for _ in range(MOST_ROUNDS):
            before = best
            for name, values in grid.items():
                self.try_all([best, *(best | {name: float(value)} for value in values)], name)
                best = max(self.tried, key=lambda entry: _rank(entry["scores"][self.score]))["options"]
            if best == before:
                break
        return best

    def try_all(self, settings: Sequence[dict[str, float]], name: str) -> None:
        """Measure those that were not tried yet, in one pass over the images."""
        known = [entry["options"] for entry in self.tried]
        new = [options for place, options in enumerate(settings) if options not in [*known, *settings[:place]]]
        if not new:
            return
        metrics = [copy.deepcopy(self.metric) for _ in new]
        on_image = self.on_pass(name, self.cache.images)
        for truth, found in self.cache.maps(new):
            for metric, segments in zip(metrics, found, strict=True):
                metric.add(metric.measure(segments, truth)[None])
            on_image()
        for options, metric in zip(new, metrics, strict=True):
            self.tried.append(dict(options=options, scores=metric.compute()))

    def outcomes(self, options: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and outcomes of all segments: see `outcomes` of the metrics."""
        scores, outcomes = [], []
        on_image = self.on_pass("Calibration", self.cache.images)
        for truth, (found,) in self.cache.maps([options]):
            if found.scores is not None:
                scores.append(found.scores.numpy())
                outcomes.append(self.metric.outcomes(found, truth))
            on_image()
        return np.concatenate([[], *scores]), np.concatenate([np.zeros(0, dtype=np.int8), *outcomes])


def _rank(score: float) -> float:
    """NaN, where nothing was there and nothing found, is no score to prefer."""
    return -1.0 if np.isnan(score) else score

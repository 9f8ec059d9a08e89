"""All scores of a model from one call: in transformers' Trainer, in an Accelerate loop, on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.inference_defaults import (
    NO_CLEAN_UP,
    checked_inference_defaults,
    defaults_of,
    merged_defaults,
    task_options,
)
from ..models.options import require_range
from ..models.post_processing import classifies_pixels
from ..models.segments import Segments
from ..utils.tasks import TASKS
from .bootstrap import Bootstrap
from .metric import MAPS, METRICS


class Evaluator:
    """Scores at the original size of the images, without the padding.

    Memory does not grow with the images, but for the matches of each instance that AP keeps.

    - semantic: mean IoU and its kin; boundary IoU, if `boundary`.
    - panoptic: PQ, SQ, RQ of all classes, things and stuff.
    - instance: mask AP of things, from all instances with their scores; F1, precision and recall at IoU 0.5 of the
      things in the panoptic map, which is one set of instances without overlap.
    - `metrics`: any others, of your own too; `register_metric` says what one is.

    With transformers' Trainer it is `compute_metrics`, with `batch_eval_metrics=True`; with Accelerate::

        found = evaluator.measure(model(**batch), ground_truth)
        found = accelerator.pad_across_processes(found, dim=1, pad_index=-100)  # for AP, rows a true or found instance
        evaluator.add(accelerator.gather_for_metrics(found))

    Args:
        image_processor: makes maps of the outputs of the model.
        id2label: names of the classes 0..K-1, of the model and the ground truth.
        stuff_ids: classes that are one segment an image; the others are things.
        tasks: what is scored.
        metrics: further metrics: registered names, classes, or ready ones.
        bootstrap: replicates for 95 % intervals over images; 0: no intervals.
        threshold: of panoptic maps, 0 to 1. None: as saved with the image processor, else 0.5.
        mask_threshold: of panoptic maps and of instances, 0 to 1. None: as saved, else 0.5.
        overlap_threshold: of panoptic maps, 0 to 1. None: as saved, else 0.8.
        post_processing: further options of the maps, as `inference_defaults` has them, such as {"panoptic":
            {"max_hole_share": 0.05}}. What neither this nor the image processor says about duplicates, holes and
            fragments is off, as in the paper's code.
        options: of the metrics that take them: `boundary=True` for boundary IoU, `max_detections`, most instances of a
            class in an image that count for AP (100), or those of your own metrics.

    Raises:
        ValueError: no task, an unknown one, instances of classes of which none is a thing, boundaries without the task
            semantic, an unknown metric, or a threshold or number out of its range.
        TypeError: no metric has such an option.

    Examples:
        >>> from maskcls_hf import MaskClsImageProcessor
        >>> evaluator = Evaluator(MaskClsImageProcessor(num_labels=2), {0: "road", 1: "sky"})
        >>> truth = Segments.from_class_map(torch.tensor([[0, 0, 1, 1]]))
        >>> evaluator.add(evaluator.measure_maps([{"semantic": torch.tensor([[0, 0, 0, 1]])}], [truth]))
        >>> round(evaluator.compute()["mean_iou"], 3)
        0.583
    """

    def __init__(
        self,
        image_processor: Any,
        id2label: Mapping[int, str],
        stuff_ids: Collection[int] = (),
        tasks: Sequence[str] = ("semantic",),
        *,
        metrics: Sequence[Any] = (),
        bootstrap: int = 0,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_threshold: float | None = None,
        post_processing: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ):
        if not (tasks or metrics) or not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(tasks) or 'none'}.")
        thresholds = dict(threshold=threshold, mask_threshold=mask_threshold, overlap_threshold=overlap_threshold)
        for name, value in thresholds.items():
            if value is not None:
                require_range(name, value, "[0, 1]")
        require_range("bootstrap", bootstrap, "[0, inf)", integer=True)
        self.image_processor, self.tasks = image_processor, tuple(tasks)
        self.metrics: dict[str, Any] = {}
        for name, metric in _chosen(tasks, metrics, options).items():
            if isinstance(metric, type):
                taken = {key: options[key] for key in _options_of(metric) if key in options}
                metric = metric(dict(id2label), stuff_ids=stuff_ids, **taken)
            self.metrics[name] = metric
        given = {
            "panoptic": dict(
                threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_threshold
            ),
            "instance": {"mask_threshold": mask_threshold},
        }
        further = checked_inference_defaults(post_processing or {}, "post_processing")
        defaults = merged_defaults(defaults_of(image_processor), further)
        of_maps: dict[Any, dict[str, Any]] = {}
        for task in MAPS:
            used = task_options(defaults, task, given.get(task, {}), NO_CLEAN_UP[task])
            of_maps[task] = {name: value for name, value in used.items() if value is not None}
        of_maps["panoptic"] |= {"label_ids_to_fuse": sorted(stuff_ids)}
        # AP ranks all instances by their scores, and leaves those of stuff out by itself.
        of_maps["instance"] |= {"threshold": 0.0, "label_ids_to_fuse": []}
        self.options: dict[Any, dict[str, Any]] = {
            read: of_maps[read] for read in MAPS if any(m.reads == read for m in self.metrics.values())
        }
        """The maps that are scored, and the arguments of `post_process_<map>_segmentation` that make them."""
        self._bootstraps = {name: Bootstrap(metric, bootstrap) for name, metric in self.metrics.items() if bootstrap}

    @property
    def settings(self) -> dict[str, float]:
        """The thresholds that the scored maps are made with, by the names of the arguments."""
        panoptic = self.options.get("panoptic", {})
        settings = {"mask_threshold": self.options.get("instance", panoptic).get("mask_threshold")}
        if panoptic:
            settings |= {name: panoptic[name] for name in ("threshold", "mask_threshold")}
            settings["overlap_threshold"] = panoptic["overlap_mask_area_threshold"]
        return {name: value for name, value in settings.items() if value is not None}

    def measure(self, outputs: Any, ground_truth: Sequence[Segments]) -> dict[str, Tensor]:
        """Measurements of a batch.

        Args:
            outputs: of the model.
            ground_truth: of each image, at its original size.

        Returns:
            For each metric (B, ...), float64 on the CPU. Those of AP have a row for each instance (B, D, 5), so that D
            differs between batches.

        Raises:
            ValueError: the model classifies pixels, and other maps are scored than semantic ones; what a metric finds
                wrong.
        """
        if classifies_pixels(outputs) and set(self.options) != {"semantic"}:
            raise ValueError(f"a per-pixel model knows no segments: tasks can be semantic only, not {self.tasks}.")
        sizes = [true.size for true in ground_truth]
        maps: dict[str, list[Any]] = {}
        for read, options in self.options.items():
            post_process = getattr(self.image_processor, f"post_process_{read}_segmentation")
            if read == "instance":
                options = options | {"return_binary_maps": True}
            maps[read] = post_process(outputs, target_sizes=sizes, **options)
        per_image = [{read: found[i] for read, found in maps.items()} for i in range(len(sizes))]
        return self.measure_maps(per_image, ground_truth)

    def measure_maps(self, maps: Sequence[Mapping[Any, Any]], ground_truth: Sequence[Segments]) -> dict[str, Tensor]:
        """Measurements of ready maps, as for `measure`.

        Args:
            maps: of each image those that `options` names, as `Predictor.predict(images, evaluator.options)` or the
                image processor (instances as binary maps) makes them, or `Segments`.
            ground_truth: of each image, of the size of its maps.
        """
        measured: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        for of_image, true in zip(maps, ground_truth, strict=True):
            found = {read: Segments.from_output(of_image[read], true.name) for read in self.options}
            for name, metric in self.metrics.items():
                measured[name].append(metric.measure(found[metric.reads], true))
        return {name: getattr(metric, "join", torch.stack)(measured[name]) for name, metric in self.metrics.items()}

    def add(self, measurements: Mapping[str, Tensor]) -> None:
        """Add what `measure` returned, of one process or gathered from several."""
        for name, metric in self.metrics.items():
            metric.add(measurements[name])
            if name in self._bootstraps:
                self._bootstraps[name].add(measurements[name])

    def compute(self) -> dict[str, float]:
        """The scores of all metrics; with a bootstrap also `NAME_low` and `NAME_high`, the ends of the intervals."""
        scores: dict[str, float] = {}
        for name, metric in self.metrics.items():
            scores |= metric.compute()
            if name in self._bootstraps:
                for score, (low, high) in self._bootstraps[name].intervals().items():
                    scores |= {f"{score}_low": low, f"{score}_high": high}
        return scores

    def per_class(self) -> dict[str, dict[str, float]]:
        """The scores of each class, by its name."""
        scores: dict[str, dict[str, float]] = {}
        for metric in self.metrics.values():
            for label, of_class in metric.per_class().items():
                scores.setdefault(label, {}).update(of_class)
        return scores

    def reset(self) -> None:
        """Forget all images."""
        for metric in (*self.metrics.values(), *self._bootstraps.values()):
            metric.reset()

    def __call__(self, evaluation: Any, compute_result: bool) -> dict[str, float]:
        """`compute_metrics`: add the measurements of a batch; the scores, and a fresh start, after the last one."""
        self.add(evaluation.predictions)
        if not compute_result:
            return {}
        scores = self.compute()
        self.reset()
        return scores


def _chosen(tasks: Sequence[str], metrics: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> class or ready metric: those of the tasks, then the further ones."""
    known: set[str] = set()
    chosen: dict[str, Any] = {}
    for name, metric in sorted(METRICS.items(), key=lambda item: _order(item[1])):
        switch = getattr(metric, "switch", None)
        known |= {*_options_of(metric), *([switch] if switch else [])}
        is_of_task = bool(set(tasks) & set(getattr(metric, "tasks", ())))
        if switch and options.get(switch) and not is_of_task:
            raise ValueError(
                f"{switch}=True is of {metric.reads} maps: add the task {' or '.join(metric.tasks)}, or leave it out."
            )
        if is_of_task and (not switch or options.get(switch)):
            chosen[name] = metric
    names = {metric: name for name, metric in METRICS.items()}
    for given in metrics:
        if isinstance(given, str) and given not in METRICS:
            raise ValueError(
                f"There is no metric {given!r}, only {', '.join(METRICS)}. Your own one needs register_metric(name, "
                "class) first."
            )
        metric = METRICS[given] if isinstance(given, str) else given
        of_class = metric if isinstance(metric, type) else type(metric)
        known |= set(_options_of(of_class))
        chosen[names.get(of_class, of_class.__name__)] = metric
    if unknown := sorted(set(options) - known):
        raise TypeError(f"No metric has an option {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    return chosen


def _order(metric: Any) -> int:
    """Scores come in the order of the tasks."""
    return min((TASKS.index(task) for task in getattr(metric, "tasks", ())), default=len(TASKS))


def _options_of(metric: Any) -> list[str]:
    """Arguments of a metric's class beside those that all have."""
    return [name for name in inspect.signature(metric).parameters if name not in ("id2label", "stuff_ids")]

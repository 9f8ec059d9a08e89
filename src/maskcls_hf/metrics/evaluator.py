"""All scores of a model from one call: in transformers' Trainer, in an Accelerate loop, on the command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.options import require_range
from ..models.post_processing import classifies_pixels
from ..models.run_lengths import MaskRuns, Runs, as_array, places_in
from .average_precision import MaskAP, pad_rows
from .bootstrap import Bootstrap
from .boundary import BoundaryIoU
from .ground_truth import GroundTruth
from .instances import InstanceF1
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality

EvaluationTask = Literal["semantic", "panoptic", "instance"]
TASKS = ("semantic", "panoptic", "instance")


class Evaluator:
    """Scores at the original size of the images, without the padding, in memory that does not grow with the images
    (of AP the matches of each instance stay).

    - semantic: mean IoU and its kin; boundary IoU, if `boundary`.
    - panoptic: PQ, SQ, RQ of all classes, things and stuff.
    - instance: mask AP of things, from all instances with their scores; F1, precision and recall at IoU 0.5 of the
      things in the panoptic map, which is one set of instances without overlap.

    With transformers' Trainer it is `compute_metrics`, with `batch_eval_metrics=True`; with Accelerate::

        found = evaluator.measure(model(**batch), ground_truth)
        found = accelerator.pad_across_processes(found, dim=1, pad_index=-100)  # for AP, rows a true or found instance
        evaluator.add(accelerator.gather_for_metrics(found))

    Args:
        image_processor: makes maps of the outputs of the model.
        id2label: names of the classes 0..K-1, of the model and the ground truth.
        stuff_ids: classes that are one segment an image; the others are things.
        tasks: what is scored.
        boundary: boundary IoU too.
        bootstrap: replicates for 95 % intervals over images; 0: no intervals.
        threshold, mask_threshold, overlap_threshold: of panoptic maps.
        max_detections: most instances of a class in an image that count for AP.

    Raises:
        ValueError: no task, an unknown one, instances of classes of which none is a thing, boundaries without the task
            semantic, or a threshold or number out of its range.
    """

    def __init__(
        self,
        image_processor: Any,
        id2label: Mapping[int, str],
        stuff_ids: Collection[int] = (),
        tasks: Sequence[str] = ("semantic",),
        *,
        boundary: bool = False,
        bootstrap: int = 0,
        threshold: float = 0.8,
        mask_threshold: float = 0.5,
        overlap_threshold: float = 0.8,
        max_detections: int = 100,
    ):
        if not tasks or not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(tasks) or 'none'}.")
        if boundary and "semantic" not in tasks:
            raise ValueError("boundary=True is of semantic maps: add the task semantic, or leave it out.")
        thresholds = dict(threshold=threshold, mask_threshold=mask_threshold, overlap_threshold=overlap_threshold)
        for name, value in thresholds.items():
            require_range(name, value, "[0, 1]")
        require_range("bootstrap", bootstrap, "[0, inf)", integer=True)
        require_range("max_detections", max_detections, "[1, inf)", integer=True)
        names = dict(id2label)
        things = {label: name for label, name in names.items() if label not in set(stuff_ids)}
        if "instance" in tasks and not things:
            raise ValueError("Every class is stuff, so that there are no instances to score: leave out that task.")
        self.image_processor, self.tasks = image_processor, tuple(tasks)
        self._panoptic = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap_threshold,
            "label_ids_to_fuse": sorted(stuff_ids),
        }
        self._mask_threshold = mask_threshold
        self.metrics: dict[str, Any] = {}
        if "semantic" in tasks:
            self.metrics["mean_iou"] = MeanIoU(names)
            if boundary:
                self.metrics["boundary_iou"] = BoundaryIoU(names)
        if "panoptic" in tasks:
            self.metrics["panoptic_quality"] = PanopticQuality(names, stuff_ids)
        if "instance" in tasks:
            self.metrics["mask_ap"] = MaskAP(things, max_detections)
            self.metrics["instance_f1"] = InstanceF1(things)
        self._bootstraps = {name: Bootstrap(metric, bootstrap) for name, metric in self.metrics.items() if bootstrap}

    @property
    def options(self) -> dict[Any, dict[str, Any]]:
        """The maps that are scored, and the arguments of `post_process_<map>_segmentation` that make them."""
        options: dict[Any, dict[str, Any]] = {}
        if "semantic" in self.tasks:
            options["semantic"] = {}
        if "panoptic" in self.tasks or "instance" in self.tasks:
            options["panoptic"] = self._panoptic
        if "instance" in self.tasks:  # AP ranks all instances by their scores
            options["instance"] = {"threshold": 0.0, "mask_threshold": self._mask_threshold}
        return options

    def measure(self, outputs: Any, ground_truth: Sequence[GroundTruth]) -> dict[str, Tensor]:
        """Measurements of a batch.

        Args:
            outputs: of the model.
            ground_truth: of each image, at its original size.

        Returns:
            For each metric (B, ...), float64 on the CPU. Those of `mask_ap` have a row for each instance (B, D, 5), so
            that D differs between batches.
        """
        if classifies_pixels(outputs) and self.tasks != ("semantic",):
            raise ValueError(f"a per-pixel model knows no segments: tasks can be semantic only, not {self.tasks}.")
        sizes = [true.size for true in ground_truth]
        maps: dict[str, list[Any]] = {}
        for task, options in self.options.items():
            post_process = getattr(self.image_processor, f"post_process_{task}_segmentation")
            if task == "instance":
                options = options | {"return_binary_maps": True}
            maps[task] = post_process(outputs, target_sizes=sizes, **options)
        per_image = [{task: found[i] for task, found in maps.items()} for i in range(len(sizes))]
        return self.measure_maps(per_image, ground_truth)

    def measure_maps(self, maps: Sequence[Mapping[Any, Any]], ground_truth: Sequence[GroundTruth]) -> dict[str, Tensor]:
        """Measurements of ready maps, as for `measure`.

        Args:
            maps: of each image those that `options` names, as `Predictor.predict(images, evaluator.options)` or the
                image processor (instances as binary maps) makes them.
        """
        measured = [self._measure_image(found, true) for found, true in zip(maps, ground_truth, strict=True)]
        return {
            name: (pad_rows if name == "mask_ap" else torch.stack)([of_image[name] for of_image in measured])
            for name in self.metrics
        }

    def _measure_image(self, maps: Mapping[Any, Any], true: GroundTruth) -> dict[str, Tensor]:
        measured: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            if name in ("mean_iou", "boundary_iou"):
                found = maps["semantic"]
                measured[name] = metric.measure(found if isinstance(found, Tensor) else found["segmentation"], true)
            elif name == "panoptic_quality":
                found = maps["panoptic"]
                measured[name] = metric.measure(found["segmentation"], found["segments_info"], true)
            elif name == "instance_f1":
                found = maps["panoptic"]
                infos = [info for info in found["segments_info"] if info["label_id"] in metric.names]
                masks = _masks_of(as_array(found["segmentation"]), [info["id"] for info in infos])
                measured[name] = metric.measure(masks, [info["label_id"] for info in infos], true)
            else:
                measured[name] = _measure_ap(metric, maps["instance"], true)
        return measured

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


def _masks_of(segmentation: NDArray, ids: list[int]) -> list[dict[str, Any]]:
    """COCO encodings of some segments of a map (H, W)."""
    runs = Runs.of(segmentation)
    places = runs._replace(values=places_in(runs.values, ids)).map()
    return [mask.rle() for mask in MaskRuns.of_places(places, len(ids))]


def _measure_ap(metric: MaskAP, found: Mapping[str, Any], true: GroundTruth) -> Tensor:
    infos = found["segments_info"]
    masks = [mask.rle() for mask in found["masks"]] if "masks" in found else found["segmentation"]
    return metric.measure(masks, [info["label_id"] for info in infos], [info["score"] for info in infos], true)

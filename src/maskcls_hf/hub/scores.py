"""Scores of a training or of `maskcls evaluate`, for the tables and the metadata of a model card."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from ..data.files import read_json
from ..metrics import per_class_markdown
from ..metrics.table import markdown_table
from ..utils.plain_text import markdown, percent, printable


class Metric(NamedTuple):
    """What people and the Hub call a score."""

    title: str
    hub_id: str | None = None  # of `metrics` and `model-index` in the metadata; None: not there
    required: bool = False  # NaN says that the model or the evaluation is broken, not that something was absent


METRICS = {
    "mean_iou": Metric("mean IoU", "mean_iou", required=True),
    "frequency_weighted_iou": Metric("frequency-weighted IoU"),
    "pixel_accuracy": Metric("pixel accuracy", "accuracy"),
    "mean_accuracy": Metric("mean accuracy"),
    "boundary_iou": Metric("boundary IoU", "boundary_iou"),
    "pq": Metric("PQ", "pq", required=True),
    "sq": Metric("SQ", "sq"),
    "rq": Metric("RQ", "rq"),
    "pq_things": Metric("PQ, things", "pq_things"),
    "sq_things": Metric("SQ, things"),
    "rq_things": Metric("RQ, things"),
    "pq_stuff": Metric("PQ, stuff", "pq_stuff"),
    "sq_stuff": Metric("SQ, stuff"),
    "rq_stuff": Metric("RQ, stuff"),
    "ap": Metric("mask AP", "ap", required=True),
    "ap50": Metric("AP at IoU 0.50", "ap50"),
    "ap75": Metric("AP at IoU 0.75", "ap75"),
    "ap_small": Metric("AP, small"),
    "ap_medium": Metric("AP, medium"),
    "ap_large": Metric("AP, large"),
    "ar": Metric("mean recall over IoU"),
    "f1": Metric("F1 at IoU 0.5", "f1", required=True),
    "precision": Metric("precision at IoU 0.5", "precision"),
    "recall": Metric("recall at IoU 0.5", "recall"),
}
MAIN = ("mean_iou", "pq", "ap", "f1")  # one of each task and kind of map
NO_SCORES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "step", "model_preparation_time")


@dataclass
class Scores:
    """The scores of one evaluation.

    Args:
        overall: scores over all classes, as parts of 1; NaN where one is not defined.
        intervals: low and high end of the 95 % intervals, of those that have one.
        per_class: scores of each class, by its name.
        settings: of the evaluation: `data`, `split`, `images`, `threshold`, ... as `maskcls evaluate` writes them.
        loss: of the evaluation.
    """

    overall: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None

    @classmethod
    def read(cls, path: str | Path, class_names: Collection[str] = ()) -> Scores:
        """From a JSON file; see [`Scores.of`].

        Raises:
            FileNotFoundError: no such file.
            ValueError: no JSON, or no scores in it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path} with scores.")
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold names and scores, got {type(content).__name__}.")
        try:
            return cls.of(content, class_names, str(path))
        except (AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} does not hold scores as `maskcls evaluate` writes them: {error}.") from error

    @classmethod
    def of(cls, content: Mapping[str, Any], class_names: Collection[str] = (), where: str = "the scores") -> Scores:
        """From what a training or `maskcls evaluate` wrote.

        Args:
            content: names and numbers, as `eval_results.json` has them (`eval_` before the names or not); or
                `scores`, `per_class` and `settings`, as `maskcls evaluate --json` writes them.
            class_names: of the model, to tell the `iou_CLASS` from other scores.
            where: they come from, for messages.

        Raises:
            ValueError: there is no score; or mean IoU, PQ, AP, F1 or the loss is NaN, or any is infinite.
        """
        flat = content["scores"] if isinstance(content.get("scores"), Mapping) else content
        numbers = {
            name.removeprefix("eval_"): math.nan if value is None else float(value)
            for name, value in flat.items()
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        }
        loss = numbers.pop("loss", None)
        of_classes = {f"iou_{name}": name for name in class_names}
        intervals = {
            name: (numbers[f"{name}_low"], numbers[f"{name}_high"])
            for name in numbers
            if f"{name}_low" in numbers and f"{name}_high" in numbers
        }
        of_no_score = {*NO_SCORES, *of_classes, *(f"{name}_{end}" for name in intervals for end in ("low", "high"))}
        scores = cls(
            overall={name: value for name, value in numbers.items() if name not in of_no_score},
            intervals=intervals,
            per_class={label: {"iou": numbers[name]} for name, label in of_classes.items() if name in numbers},
            settings=dict(content.get("settings") or {}),
            loss=loss,
        )
        if per_class := content.get("per_class"):
            scores.per_class = {
                label: {name: math.nan if value is None else float(value) for name, value in of_class.items()}
                for label, of_class in per_class.items()
            }
        scores._check(where)
        return scores

    def _check(self, where: str) -> None:
        if not self.overall and self.loss is None:
            raise ValueError(f"{where}: there are no scores.")
        for name, value in {**self.overall, **({} if self.loss is None else {"loss": self.loss})}.items():
            required = name == "loss" or (name in METRICS and METRICS[name].required)
            if math.isinf(value) or (math.isnan(value) and required):
                raise ValueError(
                    f"{where}: {name} is {value}, so the model or its evaluation is broken. "
                    "Look at the log of the training, and evaluate again."
                )

    def known(self) -> list[str]:
        """Names of the overall scores, in the order of the tables."""
        return [*(name for name in METRICS if name in self.overall), *(n for n in self.overall if n not in METRICS)]

    def overall_markdown(self, paper: Mapping[str, Any] | None = None) -> str:
        """Table of the overall scores in per cent.

        Args:
            paper: scores of a paper in per cent, and their `source`.
        """
        paper = {name: value for name, value in (paper or {}).items() if name in self.overall}
        headings = ["score", "%", *(["95 % interval"] if self.intervals else []), *(["paper"] if paper else [])]
        lines = [headings]
        for name in self.known():
            line = [
                METRICS[name].title if name in METRICS else markdown(name.replace("_", " ")),
                percent(self.overall[name]),
            ]
            if self.intervals:
                line.append(" to ".join(map(percent, self.intervals[name])) if name in self.intervals else "")
            if paper:
                line.append(f"{paper[name]:.1f}" if name in paper else "")
            lines.append(line)
        return markdown_table(lines)

    def per_class_markdown(self) -> str:
        """Table of the scores of each class in per cent; empty without them."""
        return per_class_markdown(self.per_class) if self.per_class else ""

    def weakest_classes(self, number: int = 3) -> list[tuple[str, str, float]]:
        """Class, score and value of the classes with the lowest scores, worst first."""
        for score in ("pq", "iou", "ap", "f1"):
            values = [(of_class[score], label) for label, of_class in self.per_class.items() if score in of_class]
            values = sorted((value, label) for value, label in values if not math.isnan(value))
            if values:
                return [(label, METRICS[score].title if score in METRICS else "IoU", v) for v, label in values[:number]]
        return []

    def hub_results(self, dataset: str, dataset_id: str) -> list[EvalResult]:
        """Entries of the metadata's `model-index`: scores as parts of 1; those that are NaN are left out."""
        split = self.settings.get("split")
        return [
            EvalResult(
                task_type="image-segmentation",
                task_name="Image Segmentation",
                dataset_type=dataset_id,
                dataset_name=printable(dataset),
                dataset_split=printable(split) if split else None,
                metric_type=METRICS[name].hub_id,  # type: ignore[arg-type]
                metric_name=METRICS[name].title,
                metric_value=round(self.overall[name], 5),
            )
            for name in self.known()
            if name in METRICS and METRICS[name].hub_id and not math.isnan(self.overall[name])
        ]

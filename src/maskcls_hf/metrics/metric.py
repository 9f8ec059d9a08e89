"""What a metric is, the registry of their names, and what those share that are made of sums over images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.configuration_maskcls import Registry
from ..models.segments import Segments

MAPS = ("semantic", "panoptic", "instance")  # what a metric can read
METRICS = Registry("metric")
NEEDED = ("reads", "measure", "add", "compute", "per_class", "reset")


def register_metric(name: str, metric: Any = None) -> Any:
    """Give a metric a name, by which `Evaluator`, recipes and the command line find it.

    A metric needs no import of this package. It is a class, made as `metric(id2label, stuff_ids=stuff_ids)`, with

    - `reads`: the map that it scores, "semantic", "panoptic" or "instance" (all instances with their scores);
    - `measure(found, true) -> Tensor`: what an image contributes; both are `Segments`;
    - `add(measurements)`: one more image, or those of several (B, ...), of this process or gathered from several;
    - `compute() -> {score: number}`, `per_class() -> {class name: {score: number}}`, `reset()`.

    Optional:

    - other arguments, with defaults: options of `Evaluator` by the same names are handed on;
    - `tasks`: those that it is scored for without being named; `switch`: the option that must be true for that;
    - `join(measurements) -> Tensor`: of a batch, padded where images differ in it; else they are stacked (B, ...);
    - for intervals: `shape` of a measurement and `scores(sums (..., *shape)) -> {score: Tensor (...)}`, where it is a
      sum over images; or `rows(measurements) -> Tensor (D, F)`, without padding, and
      `weighted_scores(rows, weights (images, R), image_of_row (D,)) -> {score: array (R,)}`.

    Args:
        name: letters, digits and underscores.
        metric: the class. None: used as a decorator, `@register_metric("dice")`.

    Returns:
        The class.

    Raises:
        ValueError: the name is taken, or the class has no such methods.

    Examples:
        >>> class Dice(SummedMetric):  # of maps of classes
        ...     reads, measures = "semantic", 2
        ...
        ...     def measure(self, found, true):
        ...         pairs = [(found.semantic_map() == label, true.semantic_map() == label) for label in self.names]
        ...         return torch.tensor([[2 * (f & t).sum(), f.sum() + t.sum()] for f, t in pairs]).double().T
        ...
        ...     def class_scores(self, sums):
        ...         return {"dice": sums[..., 0, :] / sums[..., 1, :]}
        ...
        ...     def scores(self, sums):
        ...         return {"dice": self.class_scores(sums)["dice"].nanmean(-1)}
        >>> metric = Dice({0: "road", 1: "sky"})
        >>> one, other = (Segments.from_class_map(torch.tensor([ids])) for ids in ([0, 0, 1, 1], [0, 1, 1, 1]))
        >>> metric.update(one, other)
        >>> round(metric.compute()["dice"], 3)
        0.733
    """
    if metric is None:
        return lambda metric: register_metric(name, metric)
    if missing := [part for part in NEEDED if not hasattr(metric, part)]:
        raise ValueError(f"metric {name}: {metric!r} has no {', '.join(missing)}; see register_metric.")
    if metric.reads not in MAPS:
        raise ValueError(f"metric {name}: reads must be one of {', '.join(MAPS)}, got {metric.reads!r}.")
    METRICS.register(name, metric)
    return metric


def class_names(id2label: Mapping[int, str]) -> dict[int, str]:
    """Names as keys of results: the id is added to a name that several classes have.

    Examples:
        >>> class_names({0: "cat", 1: "dog", 2: "cat"})
        {0: 'cat (0)', 1: 'dog', 2: 'cat (2)'}
    """
    times = Counter(id2label.values())
    return {i: f"{name} ({i})" if times[name] > 1 else name for i, name in sorted(id2label.items())}


def things(id2label: Mapping[int, str], stuff_ids: Collection[int]) -> dict[int, str]:
    """The classes with instances.

    Raises:
        ValueError: there are none.
    """
    found = {label: name for label, name in id2label.items() if label not in set(stuff_ids)}
    if not found:
        raise ValueError("Every class is stuff, so that there are no instances to score: leave out that task.")
    return found


def check_contiguous(id2label: Mapping[int, str]) -> None:
    """Refuses classes that are not 0..K-1.

    Raises:
        ValueError: names those that are missing.
    """
    expected = list(range(len(id2label)))
    if sorted(id2label) != expected:
        missing = sorted(set(expected) - set(id2label), key=int)[:5]
        raise ValueError(f"id2label must name the classes 0..{len(expected) - 1}; it lacks {missing}.")


def check_sizes(found: Segments, true: Segments) -> None:
    """Refuses masks and an image that differ in size.

    Raises:
        ValueError: names both sizes.
    """
    if len(found) and found.size != true.size:
        raise ValueError(
            f"{true.name}: masks and image differ in size: masks of {found.size} are scored on an image of {true.size}."
        )


class SummedMetric(ABC):
    """A metric that depends on the images through one sum of measurements, so that memory stays constant.

    A measurement is a float64 tensor of one shape for all images: processes can gather measurements, and a bootstrap
    can weigh them. A subclass has `reads`, `measures` (numbers a class), `measure`, `class_scores` and `scores`; see
    [`register_metric`].

    Args:
        id2label: names of the classes that are scored.
        stuff_ids: classes without instances; not looked at here.

    Attributes:
        sums (`torch.Tensor`): sum of the measurements so far.
    """

    reads: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[int]  # numbers a class
    join: ClassVar[Callable[[Sequence[Tensor]], Tensor]] = staticmethod(torch.stack)  # type: ignore[assignment]

    def __init__(self, id2label: Mapping[int, str], stuff_ids: Collection[int] = ()):
        self.id2label = dict(id2label)
        self.names = class_names(id2label)
        self.reset()

    @property
    def shape(self) -> tuple[int, int]:
        """Of a measurement: (numbers, classes)."""
        return self.measures, len(self.names)

    def reset(self) -> None:
        """Forget all images."""
        self.sums = torch.zeros(self.shape, dtype=torch.float64, device="cpu")

    @abstractmethod
    def measure(self, found: Any, true: Any) -> Tensor:
        """What one image contributes: float64 tensor of `shape`."""

    @abstractmethod
    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Sums of measurements (..., *shape) -> scores of each class (..., K), NaN where a class has none."""

    @abstractmethod
    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Sums of measurements (..., *shape) -> scores over all classes (...)."""

    def add(self, measurements: Tensor) -> None:
        """Adds the measurement of one image (*shape), or those of several (..., *shape).

        Raises:
            ValueError: the shape is another one.
        """
        if tuple(measurements.shape[-2:]) != self.shape:
            raise ValueError(
                f"{type(self).__name__} takes measurements (..., {self.shape[0]}, {self.shape[1]}) for its "
                f"{self.shape[1]} classes, got {tuple(measurements.shape)}."
            )
        if measurements.ndim > 2:
            measurements = measurements.flatten(0, -3).sum(0)
        self.sums += measurements.to(self.sums)

    def update(self, found: Any, true: Any) -> None:
        """Measure one image and add it; arguments of `measure`."""
        self.add(self.measure(found, true))

    def compute(self) -> dict[str, float]:
        """Scores over all classes."""
        return {name: value.item() for name, value in self.scores(self.sums).items()}

    def per_class(self) -> dict[str, dict[str, float]]:
        """Scores of each class, by its name."""
        scores = {score: values.tolist() for score, values in self.class_scores(self.sums).items()}
        return {
            name: {score: values[row] for score, values in scores.items()}
            for row, name in enumerate(self.names.values())
        }

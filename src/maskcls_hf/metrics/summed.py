"""What the scores share that are made of sums over images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
from torch import Tensor


def class_names(id2label: dict[int, str]) -> dict[int, str]:
    """Names as keys of results: the id is added to a name that several classes have."""
    times = Counter(id2label.values())
    return {i: f"{name} ({i})" if times[name] > 1 else name for i, name in sorted(id2label.items())}


def check_contiguous(id2label: dict[int, str]) -> None:
    """Raises a `ValueError` unless the classes are 0..K-1."""
    expected = list(range(len(id2label)))
    if sorted(id2label) != expected:
        missing = sorted(set(expected) - set(id2label), key=int)[:5]
        raise ValueError(f"id2label must name the classes 0..{len(expected) - 1}; it lacks {missing}.")


class SummedMetric(ABC):
    """A score that depends on the images through one sum of measurements, so that memory stays constant.

    A measurement is a float64 tensor of one shape for all images: processes can gather measurements, and a bootstrap
    can weigh them.

    Args:
        id2label: names of the classes that are scored.

    Attributes:
        sums (`torch.Tensor`): sum of the measurements so far.
    """

    measures: int  # numbers a class

    def __init__(self, id2label: dict[int, str]):
        self.id2label = id2label
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
    def measure(self, *args: Any, **kwargs: Any) -> Tensor:
        """What one image contributes: float64 tensor of `shape`."""

    @abstractmethod
    def class_scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Sums of measurements (..., *shape) -> scores of each class (..., K), NaN where a class has none."""

    @abstractmethod
    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Sums of measurements (..., *shape) -> scores over all classes (...)."""

    def add(self, measurements: Tensor) -> None:
        """Add the measurement of one image (*shape), or those of several (..., *shape).

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

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Measure one image and add it; arguments of `measure`."""
        self.add(self.measure(*args, **kwargs))

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

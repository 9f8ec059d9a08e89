"""Intervals of scores over images, by the Poisson bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Bootstrap:
    """Percentile intervals of a metric's scores, if other images of the same kind had been drawn.

    A bootstrap over images draws as many images as there are, with replacement, and scores them; here each image
    occurs in a replicate as often as a Poisson number of mean 1 says (Chamandy et al., "Estimating uncertainty for
    massive data streams", 2012). The numbers depend on the seed and the number of the image alone, so replicates are
    summed up while images stream by, and come out the same however processes share the images. For a metric of sums
    memory is constant; for `MaskAP` the matches of all instances are kept.

    Images are taken as independent: crops of one photograph, or frames of one video, are not, and then the intervals
    are too narrow. With few images (some tens) percentile intervals are too narrow as well.

    Args:
        metric: whose scores are meant, made of sums over images or of rows (`register_metric` says how). It isn't
            changed: `add` measurements to both.
        replicates: number of replicates.
        seed: of the Poisson numbers.
        level: part of the replicates inside an interval.

    Raises:
        ValueError: fewer than 2 replicates, a level that is not between 0 and 1, or a metric of another kind.

    Examples:
        >>> from maskcls_hf.metrics import MeanIoU
        >>> metric = MeanIoU({0: "road", 1: "sky"})
        >>> bootstrap = Bootstrap(metric, replicates=100)
        >>> truth = torch.tensor([[0, 0, 1, 1]])
        >>> for found in (truth, 1 - truth, truth):
        ...     bootstrap.add(metric.measure(found, truth)[None])
        >>> low, high = bootstrap.intervals()["mean_iou"]
        >>> 0 <= low < high <= 1
        True
    """

    def __init__(self, metric: Any, replicates: int = 1000, seed: int = 0, level: float = 0.95):
        if replicates < 2 or not 0 < level < 1:
            raise ValueError(f"replicates={replicates} must be at least 2 and level={level} between 0 and 1.")
        if not hasattr(metric, "weighted_scores") and not (hasattr(metric, "scores") and hasattr(metric, "shape")):
            raise ValueError(
                f"{type(metric).__name__} has neither scores(sums) nor weighted_scores(...), so that its intervals "
                "cannot be had: bootstrap=0."
            )
        self.metric, self.replicates, self.seed, self.level = metric, replicates, seed, level
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.images = 0
        self._sums: Tensor | None = None
        self._rows: list[Tensor] = []
        self._image_of_row: list[NDArray[np.int64]] = []

    def weights(self, image: int) -> NDArray[np.int64]:
        """How often an image occurs in each replicate (replicates,)."""
        bits = np.random.Philox(np.random.SeedSequence([self.seed, image]))
        return np.random.Generator(bits).poisson(1.0, self.replicates)

    def add(self, measurements: Tensor, numbers: Sequence[int] | None = None) -> None:
        """Adds the measurements of B images.

        Args:
            measurements: (B, ...), as the metric gives them.
            numbers: of the images in the data set, where a process adds but a share of them. None: they follow those
                added so far.

        Raises:
            ValueError: the measurements are of another shape, or not as many as the numbers.
        """
        images = list(range(self.images, self.images + len(measurements)) if numbers is None else numbers)
        if len(images) != len(measurements):
            raise ValueError(f"{len(measurements)} measurements but {len(images)} numbers of images.")
        self.images += len(images)
        if hasattr(self.metric, "weighted_scores"):
            for number, of_image in zip(images, measurements, strict=True):
                rows = self.metric.rows(of_image)
                self._rows.append(rows)
                self._image_of_row.append(np.full(len(rows), number))
            return
        if tuple(measurements.shape[1:]) != self.metric.shape:
            raise ValueError(f"Expected measurements (B, *{self.metric.shape}), got {tuple(measurements.shape)}.")
        weights = torch.from_numpy(np.array([self.weights(number) for number in images], dtype=np.float64))
        flat = measurements.detach().cpu().double().reshape(len(images), -1)
        sums = (weights.T @ flat).view(self.replicates, *self.metric.shape)
        self._sums = sums if self._sums is None else self._sums + sums

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Each score in each replicate (replicates,)."""
        if hasattr(self.metric, "weighted_scores"):
            none = self.metric.rows(self.metric.join([]))
            rows = torch.cat([none, *self._rows]).numpy()
            images, row_of = np.unique(np.concatenate([[], *self._image_of_row]).astype(int), return_inverse=True)
            weights = np.array([self.weights(number) for number in images]).reshape(-1, self.replicates)
            found: dict[str, NDArray[np.float64]] = self.metric.weighted_scores(rows, weights, row_of)
            return found
        sums = torch.zeros(self.replicates, *self.metric.shape).double() if self._sums is None else self._sums
        return {name: values.numpy() for name, values in self.metric.scores(sums).items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Low and high end for each score; NaN where a score has no value in any replicate."""
        ends = [(1 - self.level) / 2, (1 + self.level) / 2]
        result = {}
        for name, values in self.scores().items():
            values = values[~np.isnan(values)]
            low, high = np.quantile(values, ends).tolist() if len(values) else (float("nan"), float("nan"))
            result[name] = (low, high)
        return result

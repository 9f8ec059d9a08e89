"""Whether scores are probabilities: the score of a segment against the share of such segments that are right."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..utils.writing import replacing


@dataclass(frozen=True)
class Calibration:
    """Predicted segments in bins of equal width by their score: a reliability diagram.

    The expected calibration error is the sum over the bins of |share of matched segments - mean score|, weighted by the
    share of all segments that are in the bin (Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks,
    ICML 2017, Eq. 3). A segment counts as right where it matches a true one of its class with IoU > 0.5.

    Args:
        edges: of the bins (bins + 1); a score on an edge is in the lower bin, 0 in the first.
        counts: segments in each bin.
        scores: mean score in each bin; None in an empty one.
        matched: share of matched segments in each bin; None in an empty one.
        error: None without any segment.

    Examples:
        >>> calibration = Calibration.of((np.array([0.95, 0.95, 0.55]), np.array([1, 0, 1])))
        >>> calibration.counts
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
        >>> round(calibration.error, 3)
        0.45
    """

    edges: list[float]
    counts: list[int]
    scores: list[float | None]
    matched: list[float | None]
    error: float | None

    @classmethod
    def of(cls, found: tuple[NDArray[np.floating], NDArray[np.integer]], bins: int = 10) -> Calibration:
        """The calibration of segments with their outcomes.

        Args:
            found: score (S,), from 0 to 1, and outcome (S,) of each segment: 1 matched, 0 not, -1 does not count.
            bins: number of bins.
        """
        scores, outcomes = found
        counted = outcomes >= 0
        scores, outcomes = scores[counted], outcomes[counted]
        edges = np.linspace(0, 1, bins + 1)
        places = np.searchsorted(edges[1:-1], scores)
        counts = np.bincount(places, minlength=bins)
        means, shares = (
            [
                None if not n else float(total / n)
                for total, n in zip(np.bincount(places, of, bins), counts, strict=True)
            ]
            for of in (scores, outcomes)
        )
        gaps = [
            n * abs(score - share)
            for n, score, share in zip(counts, means, shares, strict=True)
            if score is not None and share is not None
        ]
        error = float(sum(gaps) / len(scores)) if len(scores) else None
        return cls(edges.tolist(), counts.tolist(), means, shares, error)

    def draw(self, path: str | Path, title: str = "") -> bool:
        """Writes the reliability diagram as PNG; False without matplotlib: then there is none.

        Args:
            path: of the PNG.
            title: above the diagram; "": none.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return False
        figure = Figure(figsize=(5, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        width, centers = 1 / len(self.counts), [(low + high) / 2 for low, high in pairwise(self.edges)]
        upper.bar(centers, [share or 0 for share in self.matched], width, edgecolor="white", label="segments")
        upper.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
        points = [pair for pair in zip(self.scores, self.matched, strict=True) if None not in pair]
        upper.plot(*([list(values) for values in zip(*points, strict=True)] or [[], []]), "o", color="tab:red")
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share matched at IoU > 0.5")
        error = "none found" if self.error is None else f"expected calibration error {self.error:.3f}"
        upper.set_title(f"{title}\n{error}" if title else error)
        upper.legend(loc="upper left")
        bars = lower.bar(centers, self.counts, width, edgecolor="white", color="tab:gray")
        lower.bar_label(bars, fontsize=8)
        lower.margins(y=0.25)
        lower.set(xlabel="score of the segment", ylabel="segments")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=100)
        return True

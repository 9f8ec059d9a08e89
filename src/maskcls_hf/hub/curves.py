"""Losses and scores over the steps of a training, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.writing import replacing
from .scores import MAIN, METRICS

Points = list[tuple[int, float]]


def draw_curves(log: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Draw losses and the main scores.

    Args:
        log: `log_history` of a `trainer_state.json`.
        path: of the picture.

    Returns:
        False without anything to draw, or without matplotlib: then there is no picture.
    """
    panels = [panel for panel in (losses_of(log), scores_of(log)) if panel]
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, curves in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    return True


def losses_of(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Losses of training and evaluation over the steps."""
    names = {"loss": "loss in training", "eval_loss": "loss in evaluation"}
    return {title: points for name, title in names.items() if (points := _points_of(log, name))}


def scores_of(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """One evaluation alone is no curve."""
    return {METRICS[name].title: points for name in MAIN if len(points := _points_of(log, f"eval_{name}")) > 1}


def _points_of(log: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Step and value of the entries that have a finite one."""
    found = [(entry["step"], entry[name]) for entry in log if "step" in entry and entry.get(name) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]

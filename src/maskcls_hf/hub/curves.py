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
    panels = {"loss": losses_of(log), "score in evaluation, %": scores_of(log)}
    panels = {label: curves for label, curves in panels.items() if curves}
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    last = max(step for curves in panels.values() for points in curves.values() for step, _ in points)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axis.set(xlabel="step", ylabel=label, xlim=(0, 1.02 * last))
        axis.grid(alpha=0.3)
        axis.legend()
    if len(panels) > 1:
        for axis, title in zip(axes, ("(a) losses", "(b) scores"), strict=True):
            axis.set_title(title, loc="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    return True


def losses_of(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Losses of training and evaluation over the steps."""
    names = {"loss": "loss in training", "eval_loss": "loss in evaluation"}
    return {title: points for name, title in names.items() if (points := _points_of(log, name))}


def scores_of(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """In per cent; one evaluation alone is no curve."""
    curves = {METRICS[name].title: _points_of(log, f"eval_{name}") for name in MAIN}
    several = {title: points for title, points in curves.items() if len(points) > 1}
    return {title: [(step, 100 * score) for step, score in points] for title, points in several.items()}


def _points_of(log: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Step and value of the entries that have a finite one."""
    found = [(entry["step"], entry[name]) for entry in log if "step" in entry and entry.get(name) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]

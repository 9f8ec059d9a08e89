"""`validate_dataset`: a doctor for labels. It reads every file and says what is wrong and what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..files import require_folder, some
from ..open_dataset import LAYOUTS, find_layout, open_dataset
from .cityscapes_survey import CityscapesSurvey
from .coco_survey import CocoInstancesSurvey
from .panoptic_survey import CocoPanopticSurvey
from .report import ClassCount, Report, SplitReport
from .rules import RULES, Finding, Rule
from .splits import find_splits, layout_of
from .survey import AdeSurvey, FolderSurvey, Item, Survey
from .tally import Tally, conclude, measure

__all__ = ["RULES", "ClassCount", "Finding", "Report", "Rule", "SplitReport", "validate_dataset"]

SURVEYS: dict[str, type[Survey]] = {
    "cityscapes": CityscapesSurvey,
    "ade20k": AdeSurvey,
    "coco_panoptic": CocoPanopticSurvey,
    "folder": FolderSurvey,
    "coco_instances": CocoInstancesSurvey,
}
MOST_WORKERS = 8


def validate_dataset(
    root: str | Path,
    splits: Sequence[str | None] | None = None,
    layout: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    size: Mapping[str, int] | None = None,
    num_queries: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks images and annotations of a data set; what is wrong becomes findings of the report.

    Args:
        root: folder of the data.
        splits: names of its parts; None: all that are found.
        layout: as for `open_dataset`; None: found by looking.
        options: further arguments of `open_dataset`.
        size: of the image processor; segments that vanish at it are found. None: not looked for.
        num_queries: images with more segments are found. None: not looked for.
        limit: read the files of this many images of a split, evenly chosen; None: all. The folders and json files are
            looked through in any case.
        workers: threads; None: as many as there are processors, at most 8.
        on_progress: called with the number of checked images and of all.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an unknown layout.
    """
    start = time.monotonic()
    root = Path(root)
    require_folder(root, "data set")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: the layouts are {', '.join(LAYOUTS)}.")
    options = dict(options or {})
    names: list[str | None] = [split or None for split in splits or ()]
    if names:
        layout = layout or layout_of(root, names, options)
    else:
        layout, names = find_splits(root, layout, options)
    report = Report(str(root), layout, size=dict(size) if size else None, num_queries=num_queries)
    if layout is None or not names:
        report.findings.append(Finding("unknown_layout", _looked_for(root, layout, names)))
    else:
        surveys = [SURVEYS[layout](root, name, options, size) for name in dict.fromkeys(names)]
        _check(report, surveys, limit, workers, on_progress)
        _try_readers(report, surveys)
    report.seconds = time.monotonic() - start
    return report


def _check(
    report: Report,
    surveys: Sequence[Survey],
    limit: int | None,
    workers: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    report.kind = surveys[0].kind
    for survey in surveys:
        report.class_names = dict(survey.classes) | report.class_names
        report.findings += survey.findings
        images = sum(item.image is not None for item in survey.items)
        report.splits.append(SplitReport(survey.split, images, sum(map(survey.has_labels, survey.items))))
    jobs = [
        (split, survey, item)
        for split, survey in zip(report.splits, surveys, strict=True)
        for item in _chosen(survey.items, limit)
    ]
    tally = Tally(report)
    pool = ThreadPoolExecutor(workers or min(MOST_WORKERS, os.cpu_count() or 1))
    try:
        measured = pool.map(lambda job: measure(job[2], job[1], report.num_queries), jobs)
        for done, (job, measurement) in enumerate(zip(jobs, measured, strict=True), start=1):
            job[0].checked += job[2].image is not None
            tally.add(job[0], measurement)
            if on_progress is not None:
                on_progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    conclude(tally, surveys)


def _chosen(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _try_readers(report: Report, surveys: Sequence[Survey]) -> None:
    """Splits in which nothing is wrong must open: else this check and the reader disagree."""
    wrong = {finding.split for finding in report.findings if finding.severity == "error"}
    for survey in surveys:
        if wrong & {survey.split, None}:
            continue
        try:
            dataset = open_dataset(report.root, survey.split, report.layout, **survey.options)
            dataset[0]
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            report.findings.append(Finding("reader_refuses", f"{type(error).__name__}: {error}", survey.split))


def _looked_for(root: Path, layout: str | None, splits: Sequence[str | None]) -> str:
    if layout is None:
        try:
            find_layout(root, splits[0] if splits else None)
        except FileNotFoundError as error:
            return str(error)
    there = sorted(path.name for path in root.iterdir())
    return f"No split of layout {layout} in {root}, which holds {some(there, 20) or 'nothing'}."

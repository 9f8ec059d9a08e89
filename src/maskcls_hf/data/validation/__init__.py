"""`validate_dataset`: the label validator. It reads every file and says what is wrong and what to do."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.places import require_folder
from ..checks import RULES, Finding, Rule
from ..dataset import SegmentationDataset
from ..files import some
from ..layouts import find_layout, find_splits, layout_class
from .building import ReportBuilder, measure
from .report import ClassCount, Report, SplitReport

__all__ = ["RULES", "ClassCount", "Finding", "Report", "Rule", "SplitReport", "validate_dataset"]

_MOST_WORKERS = 8


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

    Returns:
        Counts and findings; data without a known layout is a finding, too.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an unknown layout.

    Examples:
        >>> import tempfile
        >>> report = validate_dataset(tempfile.mkdtemp())
        >>> report.ok, [finding.kind for finding in report.findings]
        (False, ['unknown_layout'])
    """
    start = time.monotonic()
    root = Path(root)
    require_folder(root, "data set")
    if layout is not None:
        layout_class(layout)
    options = dict(options or {})
    layout, names = find_splits(root, layout, [split or None for split in splits or ()], options)
    report = Report(str(root), layout, size=dict(size) if size else None, num_queries=num_queries)
    builder = ReportBuilder(report, root)
    if layout is None or not names:
        builder.find(None, "unknown_layout", _looked_for(root, layout, names))
    else:
        opened = [(name, _open(builder, root, layout, name, options)) for name in names]
        _check(builder, [(name, data) for name, data in opened if data is not None], limit, workers, on_progress)
    report.seconds = time.monotonic() - start
    return report


def _open(
    builder: ReportBuilder, root: Path, layout: str, split: str | None, options: dict[str, Any]
) -> SegmentationDataset | None:
    """The reader of a split, which reports and goes on; None, and a finding, where it refuses even so."""
    reader: Any = layout_class(layout)
    known = inspect.signature(reader).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if unknown := [] if takes_all else sorted(set(options) - set(known)):
        has = some([name for name in known if name not in ("root", "split", "cache", "report")], 20) or "none"
        builder.find(split, "reader_refuses", f"layout {layout} has no option {some(unknown)}; it has {has}")
    given = {name: value for name, value in options.items() if name not in unknown}
    try:
        data: SegmentationDataset = reader(root, split, report=builder.report_of(split), **given)
    except (ImportError, OSError, ValueError, TypeError, KeyError, IndexError) as error:
        builder.find(split, "reader_refuses", f"{type(error).__name__}: {error}")
        return None
    return data


def _check(
    builder: ReportBuilder,
    opened: Sequence[tuple[str | None, SegmentationDataset]],
    limit: int | None,
    workers: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    report = builder.report
    jobs = []
    for split, data in opened:
        counts = builder.add_split(split, data)
        jobs += [(counts, data, index) for index in _chosen(len(data), limit)]
    pool = ThreadPoolExecutor(workers or min(_MOST_WORKERS, os.cpu_count() or 1))
    try:
        found = pool.map(lambda job: measure(job[1], job[2], builder.root, report.size, report.num_queries), jobs)
        for done, ((counts, _, _), measurement) in enumerate(zip(jobs, found, strict=True), start=1):
            builder.add(counts, measurement)
            if on_progress is not None:
                on_progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    builder.conclude([data for _, data in opened])


def _chosen(length: int, limit: int | None) -> list[int]:
    if limit is None or limit >= length:
        return list(range(length))
    chosen: list[int] = np.linspace(0, length - 1, limit).round().astype(int).tolist()
    return chosen


def _looked_for(root: Path, layout: str | None, splits: Sequence[str | None]) -> str:
    if layout is None:
        try:
            find_layout(root, splits[0] if splits else None)
        except FileNotFoundError as error:
            return str(error)
    there = sorted(path.name for path in root.iterdir())
    return f"No split of layout {layout} in {root}, which holds {some(there, 20) or 'nothing'}."

"""What `validate_dataset` returns."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..checks import RULES, Finding


@dataclass
class ClassCount:
    """Images with a class, its segments, and its pixels."""

    images: int = 0
    segments: int = 0
    pixels: int = 0


@dataclass
class SplitReport:
    """What a split holds.

    Args:
        name: of the split; None where there are no splits.
        images: how many there are.
        labels: how many there are.
        checked: images whose files were read.
        sizes: (height, width) -> number of checked images.
        segments: number in each checked image; of a class map, of classes.
        crowds: crowd regions, which are among the segments.
        pixels: of all checked labels.
        void_pixels: the unlabeled ones among them.
        classes: label id in the files -> counts.
    """

    name: str | None
    images: int = 0
    labels: int = 0
    checked: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    segments: list[int] = field(default_factory=list)
    crowds: int = 0
    pixels: int = 0
    void_pixels: int = 0
    classes: dict[int, ClassCount] = field(default_factory=dict)

    @property
    def median_segments(self) -> float:
        """Median number of segments of a checked image; 0 where none was checked."""
        return statistics.median(self.segments or [0])

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the split for a JSON file, without those of its classes."""
        return {
            "name": self.name,
            "images": self.images,
            "labels": self.labels,
            "checked": self.checked,
            "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in self.sizes.most_common()],
            "segments": sum(self.segments),
            "segments_per_image": {
                "smallest": min(self.segments, default=0),
                "median": self.median_segments,
                "largest": max(self.segments, default=0),
            },
            "crowds": self.crowds,
            "pixels": self.pixels,
            "void_pixels": self.void_pixels,
        }


@dataclass
class Report:
    """What [`validate_dataset`] found.

    Args:
        root: folder of the data.
        layout: name of its layout; None: not known.
        kind: "semantic", "instance" or "panoptic".
        class_names: label id in the files -> name.
        splits: counts of each split.
        findings: in the order in which they were found.
        size: of the image processor, that segments were compared with.
        num_queries: that numbers of segments were compared with.
        seconds: that the check took.
    """

    root: str
    layout: str | None = None
    kind: str = "semantic"
    class_names: dict[int, str] = field(default_factory=dict)
    splits: list[SplitReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    size: dict[str, int] | None = None
    num_queries: int | None = None
    seconds: float = 0.0

    def count(self, severity: str) -> int:
        """Number of findings of a severity: "error", "warning" or "note"."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def ok(self) -> bool:
        """No error."""
        return self.count("error") == 0

    def grouped(self) -> dict[str, list[Finding]]:
        """Findings by kind, in the order of `RULES`: errors first."""
        of_kind: dict[str, list[Finding]] = {}
        for finding in self.findings:
            of_kind.setdefault(finding.kind, []).append(finding)
        return {kind: of_kind[kind] for kind in RULES if kind in of_kind}

    def class_counts(self, label: int) -> list[ClassCount]:
        """Counts of a class in each split."""
        return [split.classes.get(label, ClassCount()) for split in self.splits]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        labels = set(self.class_names).union(*(split.classes for split in self.splits))
        return {
            "root": self.root,
            "layout": self.layout,
            "kind": self.kind,
            "ok": self.ok,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "size": self.size,
            "num_queries": self.num_queries,
            "seconds": round(self.seconds, 2),
            "splits": [split.to_dict() for split in self.splits],
            "classes": [self._class(label) for label in sorted(labels)],
            "findings": [finding.to_dict() for found in self.grouped().values() for finding in found],
        }

    def _class(self, label: int) -> dict[str, Any]:
        counts = zip(self.splits, self.class_counts(label), strict=True)
        of_splits = {split.name or "": vars(count) for split, count in counts}
        return {"label_id": label, "name": self.class_names.get(label), "splits": of_splits}

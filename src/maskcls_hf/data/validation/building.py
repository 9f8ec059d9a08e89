"""What is found in the files of a data set, added up.

The numbers of the report, and the rules that hold for all layouts, of single images, of the classes, and of the splits
together.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ...models.image_reading import EXIF_ORIENTATION, TURNED, image_to_tensor, open_image
from ..checks import VOID_NAMES, Checked, CheckedSegment, Finding, Picture, ReportFault, shown_path
from ..dataset import SegmentationDataset
from ..files import has_controls, shown, some
from .occurrence import nothing_to_learn
from .report import ClassCount, Report, SplitReport
from .vanishing import vanished, vanished_masks

TINY = 10  # pixels
# Modes that become RGB as they are.
_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass
class _Measurement:
    """What one image showed. Findings are kind, message and file."""

    name: str
    has_image: bool
    picture: Picture | None = None
    checked: Checked | None = None
    findings: list[tuple[str, str, Path | str | None]] = field(default_factory=list)


def measure(
    data: SegmentationDataset, index: int, root: Path, size: Mapping[str, int] | None, num_queries: int | None
) -> _Measurement:
    """Reads the files of an image.

    Args:
        data: the split.
        index: of the image.
        root: folder of the data, for messages.
        size: of the image processor; None: segments that vanish at it are not looked for.
        num_queries: of the model; None: images with more segments are not looked for.
    """
    image, label = data.image_path(index), data.label_path(index)
    found = _Measurement(shown_path(image or label, root) or data.names[index], image is not None)

    def report(kind: str, message: str, file: Path | str | None = None, error: Exception | None = None) -> None:
        found.findings.append((kind, message, file or label or found.name))

    if image is not None:
        found.picture = read_picture(image, report)
    if data.is_labeled(index):
        try:
            found.checked = data.check(index, found.picture, report)
        except Exception as error:  # whatever a json can hold, the other files are still checked
            report("bad_record", f"{type(error).__name__}: {error}")
    if found.checked is not None:
        _check_segments(found.checked, data, size, num_queries, report)
    return found


def read_picture(path: Path, report: ReportFault) -> Picture | None:
    """Decodes an image; None, and a report, where that fails."""
    try:
        content = path.read_bytes()
        image = open_image(io.BytesIO(content))
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        if image.mode not in _IMAGE_MODES or image.format == "TIFF":  # whose samples can have a sign
            image_to_tensor(image)
    except Exception as error:  # broken headers raise errors of many types
        report("unreadable_image", str(error), path)
        return None
    width, height = image.size
    size = (width, height) if orientation in TURNED else (height, width)
    return Picture(size, (height, width), orientation, hashlib.sha1(content, usedforsecurity=False).digest())


def _check_segments(
    checked: Checked,
    data: SegmentationDataset,
    size: Mapping[str, int] | None,
    num_queries: int | None,
    report: ReportFault,
) -> None:
    segments, stuff = [segment for segment in checked.segments if not segment.crowd], data.stuff_labels
    if not segments and checked.void == checked.size[0] * checked.size[1]:
        report("all_void", "all pixels are unlabeled")
    elif data.expects_things and all(segment.label in stuff for segment in segments):
        report("no_segments", "no instance")
    lost = vanished_masks(checked.masks, checked.size, size) if checked.ids is None else vanished(checked.ids, size)
    few: dict[str, list[CheckedSegment]] = {
        "tiny_segment": [segment for segment in segments if segment.area < TINY],
        "vanishing": [segment for segment in segments if segment.place in lost],
    }
    for kind, found in few.items():
        names = [f"{data.class_names.get(s.label, f'label {s.label}')} ({s.area} px)" for s in found]
        if found:
            report(kind, f"{len(found)} of {len(segments)}: {some(names)}")
    if num_queries is not None and len(segments) > num_queries:
        report("too_many_segments", f"{len(segments)} segments, {num_queries} queries")


class ReportBuilder:
    """Adds what is found to a report. What must be compared between files is kept here.

    Args:
        report: is filled.
        root: folder of the data.
    """

    def __init__(self, report: Report, root: Path):
        self.report, self.root = report, root
        self.values: set[int] = set()
        self.learned: dict[str | None, set[int]] = {}  # of each split the classes of segments that are no crowds
        self._palette: dict[int, tuple[tuple[int, ...], str]] = {}
        self._digests: dict[bytes, tuple[str | None, str]] = {}

    def find(
        self,
        split: str | None,
        kind: str,
        message: str,
        file: Path | str | None = None,
        error: Exception | None = None,
    ) -> None:
        """Adds a finding.

        Args:
            split: of the data; None: all of it.
            kind: key of `RULES`.
            message: what is wrong.
            file: that it is about; None: the split.
            error: not looked at; readers give it, see [`ReportFault`].
        """
        self.report.findings.append(Finding(kind, message, split, shown_path(file, self.root)))

    def report_of(self, split: str | None) -> ReportFault:
        """To be told what is wrong with a split."""
        return partial(self.find, split)

    def add_split(self, split: str | None, data: SegmentationDataset) -> SplitReport:
        """Begins the counts of a split, with the numbers of its images and labels."""
        if not self.report.splits:
            self.report.kind = data.kind
        self.report.class_names = data.class_names | self.report.class_names
        indices = range(len(data))
        images = sum(data.image_path(index) is not None for index in indices)
        self.report.splits.append(SplitReport(split, images, sum(map(data.is_labeled, indices))))
        return self.report.splits[-1]

    def add(self, split: SplitReport, found: _Measurement) -> None:
        """Adds what one image showed to the counts of its split."""
        for kind, message, file in found.findings:
            self.find(split.name, kind, message, file)
        split.checked += found.has_image
        if found.picture is not None:
            split.sizes[found.picture.size] += 1
            self._compare_digest(split.name, found.name, found.picture.digest)
        if found.checked is None:
            return
        checked = found.checked
        self.values |= checked.values
        self._compare_palette(split.name, found.name, checked.palette)
        split.pixels += checked.size[0] * checked.size[1]
        split.void_pixels += checked.void
        split.segments.append(len(checked.segments))
        split.crowds += sum(segment.crowd for segment in checked.segments)
        learned = self.learned.setdefault(split.name, set())
        for segment in checked.segments:
            if segment.area and not segment.crowd:
                learned.add(segment.label)
            count = split.classes.setdefault(segment.label, ClassCount())
            count.segments += 1
            count.pixels += segment.area
        for label in {segment.label for segment in checked.segments}:
            split.classes[label].images += 1

    def _compare_digest(self, split: str | None, name: str, digest: bytes) -> None:
        if digest not in self._digests:
            self._digests[digest] = (split, name)
            return
        first_split, first = self._digests[digest]
        self.find(split, "duplicate_image" if split == first_split else "leak", f"the same bytes as {first}", name)

    def _compare_palette(self, split: str | None, name: str, palette: dict[int, tuple[int, ...]]) -> None:
        for value, color in palette.items():
            first_color, first = self._palette.setdefault(value, (color, name))
            if color != first_color:
                message = f"{value} is color {color}, in {first} {first_color}"
                self.find(split, "palette_conflict", message, name)
                return

    def conclude(self, opened: Sequence[SegmentationDataset]) -> None:
        """Findings about the data set as a whole."""
        report = self.report
        for split, data in zip(report.splits[1:], opened[1:], strict=True):
            if (data.class_names, data.stuff_labels) != (opened[0].class_names, opened[0].stuff_labels):
                differ = set(data.class_names.items()) ^ set(opened[0].class_names.items())
                message = f"not as in {report.splits[0].name}: {some(sorted(differ)) or 'other classes are stuff'}"
                self.find(split.name, "classes_differ", message)
        self._check_names()
        for split in report.splits:
            if split.crowds:
                self.find(split.name, "crowd", f"{split.crowds} of {sum(split.segments)} segments")
        for kind, message in opened[0].check_values(self.values) if opened else ():
            self.find(None, kind, message)
        self._compare_splits()
        wrong = {f.split for f in report.findings if f.severity == "error"}  # what is refused is not learned either
        for split, data in zip(report.splits, opened, strict=True):
            if split.checked == split.images and split.name in self.learned and split.name not in wrong:
                learned = self.learned[split.name]
                message = nothing_to_learn(learned, data.class_names, data.stuff_labels, data.kind, split.crowds > 0)
                if message:
                    self.find(split.name, "nothing_to_learn", message)

    def _check_names(self) -> None:
        labels_of: dict[str, list[int]] = {}
        for label, name in self.report.class_names.items():
            labels_of.setdefault(name, []).append(label)
            if has_controls(name):
                self.find(None, "control_characters", f"{label}: {shown(name)}")
            if name.lower().replace(" ", "").replace("-", "") in VOID_NAMES:
                self.find(None, "void_class", f"{label}: {name}")
        for name, labels in labels_of.items():
            if len(labels) > 1:
                self.find(None, "same_class_name", f"{shown(name)} is the name of {some(labels)}")

    def _compare_splits(self) -> None:
        """Classes that are missing; only where all files were looked at."""
        report = self.report
        if any(split.checked < split.images for split in report.splits):
            return
        seen = {split.name: set(split.classes) for split in report.splits}
        ever = set().union(*seen.values())
        never = [name for label, name in report.class_names.items() if label not in ever]
        if never and ever:
            self.find(None, "never_seen", f"{len(never)} of {len(report.class_names)}: {some(never, 10)}")
        train = next((split.name for split in report.splits if (split.name or "").startswith("train")), None)
        if train is None or not seen[train]:
            return
        for split, classes in seen.items():
            absent, new = (
                [report.class_names.get(label, str(label)) for label in sorted(labels)]
                for labels in (seen[train] - classes, classes - seen[train])
            )
            lacks = f"{len(absent)} of {len(seen[train])}: {some(absent, 10)}"
            if new:
                lacking = f"; of the classes in training it lacks {lacks}" if absent else ""
                self.find(split, "not_in_train", f"{len(new)} of {len(classes)}: {some(new, 10)}{lacking}")
            elif absent and classes:
                self.find(split, "only_in_train", lacks)

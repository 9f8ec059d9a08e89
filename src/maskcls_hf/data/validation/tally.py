"""What is found in the files of a data set, added up: the numbers of the report and the findings about the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import has_controls, shown, some
from ..occurrence import nothing_to_learn
from .files import Find, Picture, read_picture
from .report import ClassCount, Report, SplitReport
from .rules import Finding
from .segments import TINY, ImageLabels, Segment
from .survey import Item, Survey

VOID_NAMES = {"void", "unlabeled", "unlabelled", "ignore", "ignored", "unannotated", "undefined", "dontcare"}


@dataclass
class Measurement:
    """What one item showed."""

    name: str
    picture: Picture | None = None
    labels: ImageLabels | None = None
    findings: list[Finding] = field(default_factory=list)


class Tally:
    """Adds measurements to a report. What must be compared between files is kept here."""

    def __init__(self, report: Report):
        self.report = report
        self.values: set[int] = set()
        self.learned: dict[str | None, set[int]] = {}  # of each split the classes of segments that are no crowds
        self._palette: dict[int, tuple[tuple[int, ...], str]] = {}
        self._digests: dict[bytes, tuple[str | None, str]] = {}

    def add(self, split: SplitReport, found: Measurement) -> None:
        self.report.findings += found.findings
        if found.picture is not None:
            split.sizes[found.picture.size] += 1
            self._compare_digest(split.name, found.name, found.picture.digest)
        if found.labels is None:
            return
        self.values |= found.labels.values
        self._compare_palette(split.name, found)
        split.pixels += found.labels.size[0] * found.labels.size[1]
        split.void_pixels += found.labels.void
        split.segments.append(len(found.labels.segments))
        split.crowds += sum(segment.crowd for segment in found.labels.segments)
        learned = self.learned.setdefault(split.name, set())
        for segment in found.labels.segments:
            if segment.area and not segment.crowd:
                learned.add(segment.label)
            count = split.classes.setdefault(segment.label, ClassCount())
            count.segments += 1
            count.pixels += segment.area
        for label in {segment.label for segment in found.labels.segments}:
            split.classes[label].images += 1

    def _compare_digest(self, split: str | None, name: str, digest: bytes) -> None:
        if digest not in self._digests:
            self._digests[digest] = (split, name)
            return
        first_split, first = self._digests[digest]
        kind = "duplicate_image" if split == first_split else "leak"
        self.report.findings.append(Finding(kind, f"the same bytes as {first}", split, name))

    def _compare_palette(self, split: str | None, found: Measurement) -> None:
        assert found.labels is not None
        for value, colour in found.labels.palette.items():
            first_colour, first = self._palette.setdefault(value, (colour, found.name))
            if colour != first_colour:
                message = f"{value} is colour {colour}, in {first} {first_colour}"
                self.report.findings.append(Finding("palette_conflict", message, split, found.name))
                return


def measure(item: Item, survey: Survey, num_queries: int | None) -> Measurement:
    """Reads the files of an item."""
    image, label = survey.shown(item.image), survey.shown(item.label)
    name = image or label or str(item.record[0]["file_name"])
    found = Measurement(name)

    def find(kind: str, message: str, file: Path | str | None = None) -> None:
        found.findings.append(Finding(kind, message, survey.split, survey.shown(file) or label or name))

    if item.image is not None:
        found.picture = read_picture(item.image, find)
    if survey.has_labels(item):
        try:
            found.labels = survey.read_labels(item, found.picture, find)
        except Exception as error:  # whatever a json can hold, the other files are still checked
            find("bad_record", f"{type(error).__name__}: {error}", None)
    if found.labels is not None:
        _check_segments(found.labels, survey, num_queries, find)
    return found


def _check_segments(labels: ImageLabels, survey: Survey, num_queries: int | None, find: Find) -> None:
    segments = [segment for segment in labels.segments if not segment.crowd]
    if not segments and labels.void == labels.size[0] * labels.size[1]:
        find("all_void", "all pixels are unlabelled", None)
    elif survey.expects_things and all(segment.label in survey.stuff for segment in segments):
        find("no_segments", "no instance", None)

    def shown(few: list[Segment]) -> str:
        return some([f"{survey.name_of(segment.label)} ({segment.area} px)" for segment in few])

    if tiny := [segment for segment in segments if segment.area < TINY]:
        find("tiny_segment", f"{len(tiny)} of {len(segments)}: {shown(tiny)}", None)
    if lost := [segment for segment in segments if segment.lost]:
        find("vanishing", f"{len(lost)} of {len(segments)}: {shown(lost)}", None)
    if num_queries is not None and len(segments) > num_queries:
        find("too_many_segments", f"{len(segments)} segments, {num_queries} queries", None)


def conclude(tally: Tally, surveys: Sequence[Survey]) -> None:
    """Findings about the data set as a whole."""
    report = tally.report
    found = report.findings
    for survey in surveys[1:]:
        if (survey.classes, survey.stuff) != (surveys[0].classes, surveys[0].stuff):
            differ = set(survey.classes.items()) ^ set(surveys[0].classes.items())
            message = f"not as in {surveys[0].split}: {some(sorted(differ)) or 'other classes are stuff'}"
            found.append(Finding("classes_differ", message, survey.split))
    labels_of: dict[str, list[int]] = {}
    for label, name in report.class_names.items():
        labels_of.setdefault(name, []).append(label)
        if has_controls(name):
            found.append(Finding("control_characters", f"{label}: {shown(name)}"))
        if name.lower().replace(" ", "").replace("-", "") in VOID_NAMES:
            found.append(Finding("void_class", f"{label}: {name}"))
    for name, labels in labels_of.items():
        if len(labels) > 1:
            found.append(Finding("same_class_name", f"{shown(name)} is the name of {some(labels)}"))
    for split in report.splits:
        if split.crowds:
            found.append(Finding("crowd", f"{split.crowds} of {sum(split.segments)} segments", split.name))
    if surveys and report.kind == "semantic" and (shifted := shift(surveys[0], tally.values)):
        found.append(Finding("off_by_one", shifted))
    if surveys and report.layout == "folder" and 255 in tally.values:
        found += _meaning_of_255(surveys[0], tally.values)
    _compare_splits(report)
    wrong = {finding.split for finding in found if finding.severity == "error"}  # what is refused is not learned either
    for split, survey in zip(report.splits, surveys, strict=True):
        if split.checked == split.images and split.name in tally.learned and split.name not in wrong:
            message = nothing_to_learn(
                tally.learned[split.name], survey.classes, survey.stuff, survey.kind, split.crowds > 0
            )
            found += [Finding("nothing_to_learn", message, split.name)] if message else []


def _meaning_of_255(survey: Survey, values: set[int]) -> Iterator[Finding]:
    """255 where it probably means something else than what it is read as."""
    is_void = 255 in getattr(survey, "void_values", set())
    if survey.kind == "semantic" and is_void and len(survey.classes) > 1 and values == {0, 255}:
        yield Finding("mask_255", "the files have no other values than 0, 255, and 255 is read as unlabelled")
    if survey.kind != "semantic" and not is_void and 254 not in values:
        others = some(sorted(values - {0, 255})) or "none"
        yield Finding("mask_255", f"255 is read as an instance; the other ids are {others}")


def shift(survey: Survey, values: set[int]) -> str | None:
    """What suggests that maps count classes from another number than the names do; None: nothing."""
    number = len(survey.classes)
    seen = values - getattr(survey, "void_values", set())
    if number < 2:
        return None
    if set(survey.classes) == set(range(number)):
        if number in seen and 0 not in seen:
            return f"the names are of 0..{number - 1}, the files hold {number} and never 0: they count from 1"
        if seen - set(survey.classes) == {number}:
            return (
                f"the names are of 0..{number - 1}, the files hold 0..{number}: 0 may be unlabelled, and the names be "
                f"of 1..{number}"
            )
        if seen == set(range(1, number)) and number > 2:
            return f"0, {survey.classes[0]}, is the only class that never occurs: the files may count from 1"
    if set(survey.classes) == set(range(1, number + 1)) and 0 in seen:
        if number in seen:
            return f"the names are of 1..{number}, the files also hold 0: unlabelled pixels, or a class without a name"
        return f"the names are of 1..{number}, the files hold 0 and never {number}: they count from 0"
    return None


def _compare_splits(report: Report) -> None:
    """Classes that are missing; only where all files were looked at."""
    if any(split.checked < split.images for split in report.splits):
        return
    seen = {split.name: set(split.classes) for split in report.splits}
    ever = set().union(*seen.values())
    never = [name for label, name in report.class_names.items() if label not in ever]
    if never and ever:
        message = f"{len(never)} of {len(report.class_names)}: {some(never, 10)}"
        report.findings.append(Finding("never_seen", message))
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
            message = f"{len(new)} of {len(classes)}: {some(new, 10)}"
            lacking = f"; of the classes in training it lacks {lacks}" if absent else ""
            report.findings.append(Finding("not_in_train", message + lacking, split))
        elif absent and classes:
            report.findings.append(Finding("only_in_train", lacks, split))

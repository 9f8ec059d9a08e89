"""What can be wrong with a data set, and what a check of one image finds.

A reader says each fault to its `report`: [`refuse`] raises it; that of `maskcls validate` notes it, and the reader goes
on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np

from ..models.image_reading import TURNED
from ..models.run_lengths import MaskRuns
from ..models.segments import VOID, Segments

Severity = Literal["error", "warning", "note"]
VOID_NAMES = {"void", "unlabeled", "unlabelled", "ignore", "ignored", "unannotated", "undefined", "dontcare"}


class Rule(NamedTuple):
    """What a kind of finding means.

    Attributes:
        severity: "error", which a reader raises; "warning"; or "note", which can be right as it is.
        title: of the finding, in a few words.
        advice: what to do about it.
    """

    severity: Severity
    title: str
    advice: str


# Severity and kind of a finding, its title, and below what to do about it.
_RULES = r"""
error unknown_layout: No known layout
    Arrange the files as one of the layouts, or name it with --layout and --split.
error missing_folder: A folder is missing
    Put the files there, or name the folder in the recipe's options.
error bad_class_names: The names of the classes cannot be read
    Write labels.json beside the splits: {"0": "sky", "1": "road"}; in a COCO json, categories with id and name.
error no_images: A split has no images
    Put images there: .jpg, .png, .tif, .bmp or .webp.
error image_without_label: Images without a label
    Annotate them, or move them out of the folder; both files have one name.
error label_without_image: Labels without an image
    Add the image, or remove the annotation.
error lossy_label: Label maps in a lossy format
    JPEG changes ids. Export them again as PNG; converting the JPEG keeps its faults.
error same_name: Several files of one name
    Rename one of them, with its partner, or remove it.
error reader_refuses: The reader refuses the data
    See the message; it names the file.
error unreadable_image: Images that cannot be read
    As the message says; a damaged file: copy or download it again, or remove it and its label.
error unreadable_label: Label files that cannot be read
    As the message says; a damaged file: export it again, or remove it and its image.
error size_mismatch: Label and image differ in size
    Export the label at the size of its image. Resize labels with nearest neighbor only.
error exif_mismatch: Image turned by its EXIF orientation, label not
    Turn the label the same way (PIL.ImageOps.exif_transpose of the image shows which), or save the image without its
    orientation tag if its pixels match the label.
error color_label: Label maps in color
    A label map has one channel of class ids. Of a palette file the indices are read: never .convert('RGB') it. Map each
    color to its id and save with mode L.
error gray_panoptic: Panoptic maps without three channels
    A COCO panoptic PNG is RGB: id = R + 256 G + 65536 B. Export it so.
error ids_outside: Label values that are no class
    Name them in labels.json; or, if they mark unlabeled pixels, give void_values in the recipe's data options (--void
    here).
error nothing_to_learn: There is nothing to learn or to score
    Look whether the labels are complete, and whether their values mean what the names of the classes say.
error classes_differ: The splits have different classes
    Give all splits the same categories and ids.
error bad_json: An annotation file cannot be read
    Export it again.
error bad_record: Incomplete records in the json
    Add the missing keys, or remove the record.
error double_id: Several records of one id
    Number them anew; annotations refer to images by id.
error missing_isthing: Categories without isthing
    Say of each category whether it is a thing (1) or stuff (0).
error orphan_annotation: Annotations of images that the json lacks
    Add the image record, or remove them.
error unknown_category: Annotations of unknown categories
    Add the category, or remove the annotations.
error json_size_mismatch: Size in the json is not that of the image
    Correct height and width, or put the right image there.
error bad_segmentation: Masks that cannot be drawn
    Correct or remove these annotations.
error ids_not_in_json: Segment ids in the PNG that the json lacks
    Add them to segments_info, or paint these pixels black (void).
warning palette_conflict: Palette indices change their color between files
    The tool that wrote them sorted the palette anew for each file, so an index is no class. Map colors to ids.
warning leak: The same image in two splits
    Remove it from one: a score on seen images is too high.
warning off_by_one: Class ids seem to be shifted by one
    Make the keys of labels.json equal to the values in the files.
warning mask_255: 255 seems to be read as something else than it means
    Save the second class of a mask as 1, each instance as 1..n. Where 255 marks unlabeled pixels of instance maps, as
    the border in Pascal VOC's SegmentationObject, give it as void (--void 255 here, void_values in the recipe's data
    options).
warning void_class: A class is named like unlabeled pixels
    It is trained and scored as a class. Leave it out of labels.json and give its value as void (--void here,
    void_values in the recipe's data options).
warning never_seen: Classes that never occur
    They cannot be learned: leave them out, or add images with them.
warning only_in_train: Classes that occur in training, but not here
    They have no score here: split the images anew.
warning not_in_train: Classes that occur, but not in training
    Their score will be 0: split the images anew, or leave them out.
warning all_void: Images with every pixel unlabeled
    Nothing is learned from them: remove or annotate them.
warning empty_segment: Segments without a pixel
    Draw them anew, or remove them: training skips them, and scores count them as not found.
warning relative_polygon: Polygons in parts of the image
    Points are pixels: multiply x by the width of the image, y by its height.
warning vanishing: Segments that vanish at training resolution
    Train at a larger size (image_processor.size of the recipe), or accept that they are not learned.
warning too_many_segments: Images with more segments than queries
    A model of N queries finds N segments at most: raise num_queries, or train and predict on crops.
warning stuff_twice: Stuff in several segments of one image
    A stuff class is one segment an image: merge them, or set isthing to 1.
warning double_annotation_id: Several annotations of one id
    Number them anew: pycocotools keeps only the last of them.
warning area_mismatch: Area in the json is not that of the mask
    Compute it anew: AP by size depends on it.
warning box_mismatch: Box in the json is not that of the mask
    Compute it anew, as [left, top, width, height].
warning box_only: Objects that are a box alone
    They are not read. Draw their masks; or take the boxes as masks, with boxes: true in the recipe's data options.
warning not_labeled: Images that nobody has annotated
    They are left out: they are no background. Annotate them, or save them as annotated and empty.
warning unknown_color: Pixels of colors that the table lacks
    They are unlabeled. Add the colors to the table; or, at smoothed borders, take the nearest color of the table, with
    nearest: true in the recipe's data options.
note skipped_shape: Shapes that are no objects
    They are not read, as the message says why.
note file_not_listed: Files that the annotations do not list
    They are not read. Nothing, if that is wanted.
note exif_turned: Images with an EXIF orientation that the size does not prove
    The image is turned upright when read. Look whether the label lies upright too.
note duplicate_image: The same image twice in a split
    Remove one, or merge their labels.
note same_class_name: Classes of one name
    They get their id behind the name; join or rename them if they are one.
note control_characters: Class names with control characters
    They are trained with, and shown as \n or \x1b. Better rename them.
note no_segments: Images without an instance
    Right for true negatives; else annotate them.
note tiny_segment: Segments of under 10 pixels
    Often slips of the annotation tool. Look at a few.
note crowd: Crowd regions
    Nothing: they are unlabeled in training, and scored as COCO does.
"""


def _read_rules(text: str) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for severity, kind, title, advice in re.findall(r"^(\w+) (\w+): (.*)\n((?:    .*\n)+)", text, re.MULTILINE):
        rules[kind] = Rule(cast(Severity, severity), title, " ".join(advice.split()))
    return rules


RULES = _read_rules(_RULES)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a data set.

    Args:
        kind: key of `RULES`.
        message: what is wrong there.
        split: of the data; None: all of it.
        file: below the data folder, or the image that the finding is about; None: the split.

    Examples:
        >>> finding = Finding("double_id", "two images have id 7", split="train")
        >>> finding.severity
        'error'
        >>> finding.to_dict()["advice"]
        'Number them anew; annotations refer to images by id.'
    """

    kind: str
    message: str
    split: str | None = None
    file: str | None = None

    @property
    def severity(self) -> Severity:
        """How bad it is, as `RULES` says of its kind."""
        return RULES[self.kind].severity

    def to_dict(self) -> dict[str, str | None]:
        """The finding with severity, title and advice of its kind, for a JSON file."""
        rule, where = RULES[self.kind], {"split": self.split, "file": self.file, "message": self.message}
        return {"kind": self.kind, "severity": rule.severity, "title": rule.title, **where, "advice": rule.advice}


class ReportFault(Protocol):
    """What a reader calls with a fault of the data; it may raise, or note the fault and let the reader go on."""

    def __call__(self, kind: str, message: str, file: Path | str | None = None, error: Exception | None = None) -> None:
        """Says what is wrong.

        Args:
            kind: key of `RULES`.
            message: of the finding, without the name of the file.
            file: that it is about; None: that of the image, or the data as a whole.
            error: what a reader raises; None: a ValueError of the message.
        """


def refuse(kind: str, message: str, file: Path | str | None = None, error: Exception | None = None) -> None:
    """The `report` of a reader that nobody checks: errors are raised, warnings and notes let pass.

    Args:
        kind: key of `RULES`.
        message: what is wrong.
        file: not looked at: the error names it.
        error: to be raised; None: a ValueError of the message.

    Raises:
        Exception: `error`, or the ValueError, if `RULES` calls this kind an error.

    Examples:
        >>> refuse("tiny_segment", "3 pixels")  # a note
        >>> refuse("bad_json", "no list of images")
        Traceback (most recent call last):
        ValueError: no list of images
    """
    if RULES[kind].severity == "error":
        raise error or ValueError(message)


def is_binary(values: Collection[int], class_names: Mapping[int, str]) -> bool:
    """Whether maps of classes hold 0 and 255 alone, and 255 is unlabeled though there are further classes.

    Masks of image editors do. So can a map in which nothing is but the first class: all maps of a data set together
    tell.

    Args:
        values: label values of the maps.
        class_names: the file's id of each class -> its name.

    Examples:
        >>> is_binary({0, 255}, {0: "background", 1: "cell"})
        True
        >>> is_binary({0, 255}, {0: "background", 255: "cell"})
        False
    """
    return set(values) == {0, 255} and 255 not in class_names and len(class_names) > 1


def shown_path(file: Path | str | None, root: Path) -> str | None:
    """A path as below the data folder."""
    if isinstance(file, Path) and file.is_relative_to(root):
        file = file.relative_to(root)
    return None if file is None else str(file)


@dataclass
class Picture:
    """An image of the data, decoded.

    Args:
        size: (height, width), upright.
        file_size: (height, width) of the pixels in the file.
        orientation: EXIF orientation, 1 for upright.
        digest: of the bytes of the file.
    """

    size: tuple[int, int]
    file_size: tuple[int, int]
    orientation: int
    digest: bytes


def compare_sizes(
    label_size: tuple[int, int], picture: Picture | None, what: str, kind: str, report: ReportFault
) -> None:
    """Reports a label whose size is not that of its image.

    Args:
        label_size: (height, width).
        picture: the image; None: it could not be read, so that there is nothing to compare.
        what: the label in words, such as "the label".
        kind: of the finding, unless the EXIF orientation explains it (`exif_mismatch`), or leaves open whether the
            label is turned (`exif_turned`).
        report: is told.
    """
    if picture is None:
        return
    if label_size == picture.size:
        if picture.orientation != 1 and picture.size == picture.file_size:
            report("exif_turned", f"orientation {picture.orientation}, {_shown(picture.size)} either way")
        return
    sizes = f"{what} is {_shown(label_size)}, the image {_shown(picture.size)}"
    if picture.orientation in TURNED and label_size == picture.file_size:
        report("exif_mismatch", f"orientation {picture.orientation}: {sizes} (width x height, upright)")
    else:
        turned = ", so one of the two is turned" if label_size == picture.size[::-1] else ""
        report(kind, f"{sizes} (width x height){turned}")


def _shown(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"


class CheckedSegment(NamedTuple):
    """A segment that a check has found.

    Attributes:
        label: id of its class in the files.
        area: pixels.
        crowd: whether it is a crowd region.
        place: its id in the map, or its place among the masks, of [`Checked`].
    """

    label: int
    area: int
    crowd: bool
    place: int


@dataclass
class Checked:
    """The annotation of an image, as its check found it.

    Args:
        size: (height, width).
        ids: map (H, W) in which the segments are, or
        masks: the segments themselves.
        segments: those with a pixel.
        void: number of unlabeled pixels.
        values: all values of a label map, void and unknown ones too.
        palette: color of each value of a palette file.
    """

    size: tuple[int, int]
    ids: np.ndarray | None = None
    masks: list[MaskRuns] = field(default_factory=list)
    segments: list[CheckedSegment] = field(default_factory=list)
    void: int = 0
    values: set[int] = field(default_factory=set)
    palette: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, segments: Segments, label_ids: Sequence[int]) -> Checked:
        """The check of segments that a reader gives.

        Args:
            segments: of an image; those without a pixel are left out.
            label_ids: the files' id of each class 0..K-1.
        """
        masks = segments.mask_runs
        void = 0 if segments.void is None else int(segments.void.sum())
        if segments.is_map:
            void = int(segments.runs.lengths[segments.runs.values == VOID].sum())
        found = zip(segments.class_labels.tolist(), masks, segments.is_crowd.tolist(), strict=True)
        return cls(
            segments.size,
            masks=masks,
            segments=[
                CheckedSegment(label_ids[label], mask.area, crowd, place)
                for place, (label, mask, crowd) in enumerate(found)
                if mask.area
            ],
            void=void,
        )

    def add(self, areas: Mapping[int, int], labels: Mapping[int, int | None], crowds: Collection[int] = ()) -> None:
        """Adds segments of a map or of masks.

        Args:
            areas: pixels of each place.
            labels: class of each place, as in the files; None: void.
            crowds: places of crowd regions.
        """
        for place, label in labels.items():
            if label is None:
                self.void += areas[place]
            else:
                self.segments.append(CheckedSegment(label, areas[place], place in crowds, place))


class Region(NamedTuple):
    """Pixels of one id.

    Attributes:
        area: their number.
        box: (left, top, width, height) around them, in pixels.
    """

    area: int
    box: Sequence[int]


def regions(ids: np.ndarray) -> dict[int, Region]:
    """Area and box of every id of a map (H, W), from its runs within rows.

    Examples:
        >>> regions(np.array([[0, 0, 7], [0, 7, 7]]))[7]
        Region(area=3, box=[1, 0, 2, 2])
    """
    if not ids.size:
        return {}
    values = ids.ravel()
    new = np.ones(values.size, dtype=bool)  # (H W,) where a run begins
    new[1:] = values[1:] != values[:-1]
    new[:: ids.shape[1]] = True
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=values.size)
    found, inverse = np.unique(values[starts], return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    first = np.searchsorted(inverse[order], np.arange(len(found)))
    rows, columns, lengths = starts[order] // ids.shape[1], starts[order] % ids.shape[1], lengths[order]
    areas = np.add.reduceat(lengths, first)
    left, top = np.minimum.reduceat(columns, first), np.minimum.reduceat(rows, first)
    width = np.maximum.reduceat(columns + lengths, first) - left
    height = np.maximum.reduceat(rows + 1, first) - top
    table = np.stack([areas, left, top, width, height], axis=1).tolist()  # (ids, 5)
    return {i: Region(row[0], row[1:]) for i, row in zip(found.tolist(), table, strict=True)}

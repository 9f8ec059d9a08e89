"""What layouts of annotation tools share: images with lists of shapes, drawn on access; how files are found."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache as cached
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ...models.run_lengths import MaskRuns
from ..checks import Checked, Picture, ReportFault, compare_sizes, refuse
from ..dataset import Kind, SegmentationDataset, check_size
from ..files import IMAGE_SUFFIXES, read_json, shown, some
from ..sample import VOID, Segments
from .coco import USUAL_SPLITS, Packed
from .drawing import Size

logger = logging.get_logger(__name__)

CUT = -2  # instead of a class: what was drawn before is not there
SPLIT_NAMES = {"val": ("val", "valid", "validation"), "train": ("train", "training")}
Background = Literal["negatives", "void", "class"]


class Shape(NamedTuple):
    """What is drawn of an object: all of it, or a part.

    Args:
        label: the file's id of its class; `VOID`; `CUT`.
        draw: gives its mask in an image of a size. It is pickled: a `functools.partial` of a function of `drawing`.
        what: it is, for messages.
        key: shapes of one key are one object; None: it is one of its own.
    """

    label: int
    draw: Callable[[Size], MaskRuns]
    what: str
    key: Any = None


class Annotated(NamedTuple):
    """An image with its shapes, in the order in which they are painted; `size` (height, width) if the file says it."""

    name: str
    image: Path
    where: str
    shapes: Sequence[Shape]
    size: Size | None = None


class Skipped:
    """Reports what is not read, and warns of it where nobody checks."""

    def __init__(self, root: Path, report: ReportFault):
        self.root, self.report, self.reasons = root, report, Counter[str]()

    def __call__(self, why: str, what: str, file: Path | str | None, kind: str = "skipped_shape") -> None:
        """Reports a thing of a file that is not read, and counts it by the reason.

        Args:
            why: it is not read.
            what: it is, or its name.
            file: that holds it.
            kind: of the finding.
        """
        self.report(kind, f"{what}: {why}", file)
        self.reasons[why] += 1

    def warn(self) -> None:
        """Logs how much was not read, and why, unless faults are collected."""
        if self.reasons and self.report is refuse:
            reasons = ", ".join(f"{number} ({why})" for why, number in sorted(self.reasons.items()))
            logger.warning(f"{self.root}: not read: {reasons}. `maskcls validate` names them.")


class ShapeDataset(SegmentationDataset):
    """Images with objects as shapes, which may overlap.

    Args:
        root: folder of the data.
        images: with their shapes; those of labels that `class_names` lacks are reported.
        class_names: by the file's ids.
        background: what pixels of no object are: "negatives" (in no segment), "void" (unlabeled), or "class" (one
            segment of stuff of class 0, "background").
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].
    """

    expects_things = True
    file_suffix: ClassVar[str] = ""

    def __init__(
        self,
        root: Path,
        images: Iterable[Annotated],
        class_names: Mapping[int, str],
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        if background not in ("negatives", "void", "class"):
            raise ValueError(f'background={background!r}: needs "negatives", "void" or "class".')
        names, stuff = dict(class_names), []
        if background == "class":
            stuff = [min(names, default=1) - 1]
            names[stuff[0]] = "background"
        kind: Kind = "panoptic" if stuff else "instance"
        if not names:
            report("bad_class_names", "no class is named", None, ValueError(f"{root}: no object with a class."))
        super().__init__(names, kind, stuff=stuff, cache=cache, report=report)
        self.root, self.background = root, background
        images = sorted(images, key=lambda image: natural(image.name))
        if not images:
            report("no_images", "no images", root, ValueError(f"No annotated images in {root}."))
        self.names = [image.name for image in images]
        self._paths, self._where = [image.image for image in images], [image.where for image in images]
        self._sizes = [image.size for image in images]
        self._shapes = Packed([tuple(shape) for shape in image.shapes] for image in images)

    def image_path(self, index: int) -> Path:
        """File of an image."""
        return self._paths[index]

    def annotation(self, index: int) -> str:
        """Where the shapes of an image stand, for messages."""
        return self._where[index]

    def read(self, index: int, size: Size) -> Segments:
        """Draws the shapes of an image; refuses an annotation that says another size."""
        if (own := self._sizes[index]) is not None:
            check_size(own, size, self.annotation(index), str(self.image_path(index)))
        return self._segments(index, size, refuse)

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """Draws the shapes of an image; reports those that cannot be drawn, or have no pixel in it."""
        size = self._sizes[index]
        if size is not None:
            compare_sizes(size, picture, "the annotation", "size_mismatch", report)
        size = picture.size if picture else size
        return None if size is None else Checked.of(self._segments(index, size, report), self.label_ids)

    def _segments(self, index: int, size: Size, report: ReportFault) -> Segments:
        masks: dict[Any, MaskRuns] = {}  # of each object, in the order of their first shapes
        labels: dict[Any, int] = {}
        void = np.zeros(size, dtype=bool)
        for place, fields in enumerate(self._shapes[index]):
            shape = Shape(*fields)
            where = f"{shape.what}, {self.class_names.get(shape.label, 'no class')}"
            try:
                mask = shape.draw(size)
            except (OSError, ValueError) as error:
                message = f"{self.annotation(index)}, {where}: {error}"
                report("bad_segmentation", f"{where}: {error}", None, ValueError(message))
                continue
            if shape.label in (VOID, CUT):
                over = mask.dense()
                masks = {key: without(known, over) for key, known in masks.items()}
                void = void | over if shape.label == VOID else void & ~over
                continue
            key = ("shape", place) if shape.key is None else shape.key
            masks[key] = MaskRuns.union([masks[key], mask]) if key in masks else mask
            labels.setdefault(key, self.class_of_label[shape.label])
        for key in [key for key, mask in masks.items() if not mask.area]:
            report("empty_segment", f"{self.class_names[self.label_ids[labels[key]]]}: no pixel in the image")
            del masks[key]
        return composed([labels[key] for key in masks], list(masks.values()), size, self.background, void)


def composed(
    labels: Sequence[int], masks: list[MaskRuns], size: Size, background: Background, void: np.ndarray
) -> Segments:
    """Segments of objects, with ids from 1; background is 0. A map where they do not overlap."""
    ids, labels = list(range(1, len(masks) + 1)), list(labels)
    covered = MaskRuns.union(masks).dense() if masks else np.zeros(size, dtype=bool)
    void = void & ~covered
    if background == "void":
        void = ~covered
    elif background == "class" and not (taken := covered | void).all():
        ids, labels, masks = [0, *ids], [0, *labels], [*MaskRuns.of_masks(~taken[None]), *masks]
    segments = Segments(torch.tensor(labels, dtype=torch.int64), masks, ids=ids, size=size, void=torch.from_numpy(void))
    if not segments.overlap:
        return Segments(segments.class_labels, segments.index_map, ids=ids, size=size)
    return segments


def without(mask: MaskRuns, over: np.ndarray) -> MaskRuns:
    """A mask without the pixels of another, (H, W)."""
    if not mask.area:
        return mask
    box, pixels = mask.window()
    return MaskRuns.of_masks((pixels & ~over[box])[None], mask.size, box[0].start, box[1].start)[0]


# -- files -------------------------------------------------------------------------------------------------------------


def natural(name: str) -> list[Any]:
    """A key to sort names by, frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."


def images_below(folder: Path) -> list[Path]:
    """Image files of a folder and of the folders in it, by name."""
    return sorted((path for path in folder.rglob("*") if is_image(path)), key=lambda path: natural(str(path)))


def without_suffix(path: Path, folder: Path) -> str:
    """Name of an image, below a folder where it lies there."""
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return inside.with_name(inside.stem).as_posix()


def split_folder(root: Path, split: str | None) -> Path | None:
    """Folder of a split, by its own or a like name; the root without a split; None: there is none."""
    if not split:
        return root
    return next((root / name for name in SPLIT_NAMES.get(split, (split,)) if (root / name).is_dir()), None)


def usual_splits(root: Path) -> list[str]:
    """Folders with a usual name of a split."""
    return [path.name for path in root.iterdir() if path.is_dir() and re.fullmatch(USUAL_SPLITS, path.name)]


def located(name: str, folders: Sequence[Path]) -> Path | None:
    """The file that a tool calls so, in or below one of the folders; None: there is none.

    The first folders of the name, which are those of another computer, may be missing.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        for folder in folders:
            path = folder.joinpath(*parts[start:])
            if os.path.isfile(path):
                return path
    return None


def json_like(path: Path, keys: Sequence[str]) -> bool:
    """Whether a file is JSON and its object, or the first one of its list, has one of the keys; looked at once."""
    return _json_like(path, tuple(keys), path.stat().st_mtime_ns)


@cached
def _json_like(path: Path, keys: tuple[str, ...], changed: int) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(2**16)
        if not any(f'"{key}"'.encode() in start for key in keys) and path.stat().st_size <= 2**16:
            return False
        content = read_json(path)
    except (OSError, ValueError):
        return False
    first = content[0] if isinstance(content, list) and content else content
    return isinstance(first, dict) and any(key in first for key in keys)


def read_records(paths: Iterable[Path], report: ReportFault) -> Iterator[tuple[Path, Any]]:
    """Content of JSON files; what cannot be read is reported."""
    for path in paths:
        try:
            yield path, read_json(path)
        except (OSError, ValueError) as error:
            report("bad_json", str(error), path, error)


def bad_record(report: ReportFault, path: Path, what: str, wrong: Any) -> None:
    """Reports a record that cannot be read."""
    report("bad_record", f"{what}: {wrong}", path, ValueError(f"{path}, {what}: {wrong}."))


def missing_image(report: ReportFault, path: Path, name: Any, looked: Sequence[Path]) -> None:
    """Reports an annotation whose image is not there."""
    where = some([str(folder) for folder in looked])
    error = FileNotFoundError(f"{path}: no image {shown(name)} in {where}.")
    report("label_without_image", f"no image {shown(name)}", path, error)

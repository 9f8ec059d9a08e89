"""ADE20K: folders of images and of label maps with names of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checks import ReportFault, refuse
from ..files import checked_names
from .folder import SegmentationFolder
from .label_maps import LabelMapDataset


class Ade20k(SegmentationFolder):
    """ADE20K as of the scene parsing challenge (`ADEChallengeData2016`).

    Layout::

        ROOT/images/SPLIT/NAME.jpg          SPLIT: training, validation
        ROOT/annotations/SPLIT/NAME.png     0 = other (void), 1..150 = classes 0..149
        ROOT/objectInfo150.txt              names; else labels.json, or `id2label` (by label value, 1..150)

    Errors as for [`SegmentationFolder`], and ValueError where value 0 is named as a class.

    Args:
        root: folder that holds images and annotations.
        split: "training" or "validation".
        id2label: names of the classes by label value, or a JSON file of them; None: as above.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].
    """

    always_split = True
    found_by_common_names = True
    split_folders = "images/{split}"

    def __init__(
        self,
        root: str | Path,
        split: str | None = "training",
        *,
        id2label: Mapping[int, str] | str | Path | None = None,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        images, labels = "images/{split}", "annotations/{split}"
        super().__init__(
            root,
            split,
            image_folder=images,
            label_folder=labels,
            id2label=id2label,
            void_values=(0,),
            cache=cache,
            report=report,
        )

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The two folders images/SPLIT and annotations/SPLIT."""
        return [root / "images" / (split or ""), root / "annotations" / (split or "")]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether both folders are there."""
        return bool(split) and all(path.is_dir() for path in cls.places(root, split))

    @staticmethod
    def class_names_of(root: Path, id2label: Any) -> tuple[dict[int, str], list[int]]:
        """Names of objectInfo150.txt where it is there and no others are given; else as [`SegmentationFolder`]."""
        table = root / "objectInfo150.txt"
        if id2label is None and table.is_file():
            names = _names_of_table(table)
        else:
            names, _ = SegmentationFolder.class_names_of(root, id2label)
        if 0 in names:
            raise ValueError(
                f"{root}: in layout ade20k label value 0 is void, but it is named as class {names[0]!r}. Of other data "
                'in folders images/SPLIT and annotations/SPLIT the layout is "folder", with the options '
                'image_folder="images/{split}" and label_folder="annotations/{split}".'
            )
        return names, []

    def check_values(self, values: set[int]) -> Iterator[tuple[str, str]]:
        """As for other label maps; masks of 0 and 255 need no look, as 0 is void."""
        return LabelMapDataset.check_values(self, values)


def _names_of_table(path: Path) -> dict[int, str]:
    """Tab-separated lines of label value, four numbers and names; the first name where no other class has it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or any(len(row) < 2 or not row[0].strip().isdecimal() for row in rows):
        raise ValueError(f"{path} is not a table with the columns Idx, ..., Name, divided by tabs.")
    names = checked_names(((int(row[0]), row[-1].strip()) for row in rows), str(path))
    first = {label: name.split(",")[0] for label, name in names.items()}
    times = Counter(first.values())
    return {label: first[label] if times[first[label]] == 1 else name for label, name in names.items()}

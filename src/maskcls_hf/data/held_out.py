"""Images that a training of data without a validation split holds out by itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.segments import Segments
from ..utils.writing import write_json
from .checks import Checked, Picture, ReportFault
from .dataset import SegmentationDataset
from .files import read_json, some
from .layouts import LAYOUTS, find_splits, open_dataset
from .sample import Sample

RECORD = "split.json"  # beside the model


def has_split(split: str, root: Path, layout: str | None, options: Mapping[str, Any]) -> bool:
    """Whether the data has a split of this name, if only a part of its files.

    Args:
        split: its name.
        root: folder of the data.
        layout: name of the layout; None: any.
        options: of the layout's reader.
    """
    layouts = [LAYOUTS[layout]] if layout is not None and layout in LAYOUTS else LAYOUTS.values()
    places = (path for known in layouts for path in known.places(root, split))
    return (
        (root / split).exists()
        or any(known.find(root, split, options) for known in layouts)
        or any(path.exists() for path in places)
    )


def training_split(split: str, root: Path, layout: str | None, options: Mapping[str, Any]) -> str | None:
    """`split`, or None where the data is not divided at all.

    Args:
        split: the name that a recipe gives.
        root: folder of the data.
        layout: name of the layout; None: any.
        options: of the layout's reader.
    """
    whole = not has_split(split, root, layout, options) and find_splits(root, layout, (), options)[1] == [None]
    return None if whole else split


def other_validation(split: str, root: Path, layout: str | None, options: Mapping[str, Any]) -> str | None:
    """The split, beside that of the training, whose name says that it is for validation; None: there is none.

    Args:
        split: of the training.
        root: folder of the data.
        layout: name of the layout; None: any.
        options: of the layout's reader.
    """
    names = (name for name in find_splits(root, layout, (), options)[1] if name and name != split)
    return next((name for name in names if name.lower().startswith(("val", "dev"))), None)


def draw(names: Collection[str], share: float, seed: int) -> list[str]:
    """Names of the images to hold out, a function of names and seed: `share` of them, at least one.

    Roboflow's copies of one image, NAME.rf.DIGITS, stay together.

    Args:
        names: of the labeled images; one that several have counts once.
        share: above 0, below 1.
        seed: of the choice.

    Returns:
        The names, sorted.

    Raises:
        ValueError: no image would be left.

    Examples:
        >>> draw([f"image_{number}" for number in range(10)], share=0.2, seed=0)
        ['image_1', 'image_4']
    """
    copies: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        copies.setdefault(re.sub(r"\.rf\.[0-9A-Za-z]+$", "", name), []).append(name)
    known = sorted(copies)
    number = max(1, round(share * len(known)))
    if number >= len(known):
        raise ValueError(f"of {len(known)} labeled images {number} cannot be held out and others be left to train on")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(name for place in order[:number] for name in copies[known[place]])


def divided(data: SegmentationDataset, held_out: Collection[str]) -> tuple[Part, Part]:
    """The other images, and those that are held out.

    Raises:
        ValueError: the data lacks some of these.
    """
    if absent := sorted(set(held_out) - set(data.names)):
        raise ValueError(
            f"{len(absent)} of the {len(held_out)} images that this training holds out are not in the data any more: "
            f"{some(absent)}."
        )
    out = set(held_out)
    kept = [index for index, name in enumerate(data.names) if name not in out]
    return Part(data, kept), Part(data, sorted(set(range(len(data))) - set(kept)))


class Part(SegmentationDataset):
    """Some images of a data set, at these indices; everything else is the data set's."""

    def __init__(self, data: SegmentationDataset, indices: Sequence[int]):
        super().__init__(data.class_names, data.kind, stuff=data.stuff_labels)
        self.data, self.indices = data, list(indices)
        self.names = [data.names[index] for index in self.indices]
        self.expects_things = data.expects_things

    def image_path(self, index: int) -> Path:
        """Of the image with this index in the part; so in the methods below."""
        return self.data.image_path(self.indices[index])

    def annotation(self, index: int) -> str:
        """As of the data set."""
        return self.data.annotation(self.indices[index])

    def read(self, index: int, size: tuple[int, int]) -> Segments:
        """As of the data set."""
        return self.data.read(self.indices[index], size)

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """As of the data set."""
        return self.data.check(self.indices[index], picture, report)

    def label_path(self, index: int) -> Path | None:
        """As of the data set."""
        return self.data.label_path(self.indices[index])

    def is_labeled(self, index: int) -> bool:
        """As of the data set."""
        return self.data.is_labeled(self.indices[index])

    def raw_map(self, index: int) -> Tensor | None:
        """As of the data set."""
        return self.data.raw_map(self.indices[index])

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images of the part."""
        sizes = self.data.sizes()
        return [sizes[index] for index in self.indices]

    def processor_fields(self) -> dict[str, Any]:
        """As of the data set."""
        return self.data.processor_fields()

    def __getitem__(self, index: int) -> Sample:
        return self.data[self.indices[index]]


# -- the record ----------------------------------------------------------------------------------------------------


def write_record(folder: Path, split: str, of: str | None, images: Sequence[str]) -> None:
    """FOLDER/split.json: which images of the split `of` stand for the split `split`, that the data does not have.

    Args:
        folder: of the model.
        split: the name that an evaluation asks for, such as "validation".
        of: the split that they were taken from; None: the data is not divided.
        images: their names.
    """
    write_json(folder / RECORD, {"split": split, "of": of, "images": list(images)}, indent=1)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What [`write_record`] wrote; None: nothing.

    Raises:
        ValueError: the file is none of these.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    content = read_json(file)
    record: dict[str, Any] = content if isinstance(content, dict) else {}
    names = record.get("images")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"{file} does not name the images that a training has held out.")
    return record


def open_evaluated(
    root: str | Path, split: str | None, layout: str | None, model: str | Path, **options: Any
) -> SegmentationDataset:
    """As [`open_dataset`]; where the data has no such split, the images that the training of `model` has held out.

    Args:
        root: folder of the data.
        split: see [`open_dataset`].
        layout: see [`open_dataset`].
        model: folder of the model, where its training has written `split.json`, or a name on the Hub.
        options: of the layout's reader.

    Raises:
        FileNotFoundError: as [`open_dataset`].
        ValueError: as [`open_dataset`]; an image that was held out is not there any more.
    """
    record = read_record(Path(model))
    if record is None or split is None or split != record.get("split") or has_split(split, Path(root), layout, options):
        return open_dataset(root, split, layout, **options)
    return divided(open_dataset(root, record.get("of"), layout, **options), record["images"])[1]

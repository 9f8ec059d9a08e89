"""Folders of images with label maps or instance maps, as a map-style data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.label_tensors import naming
from .dataset import SegmentationDataset, Targets
from .files import (
    checked_names,
    int32_ids,
    pair_files,
    read_class_names,
    read_json,
    read_map,
    require_folder,
    shown,
    some,
    unique_ids,
    with_split,
)
from .sample import VOID

LABEL_FOLDERS = ("labels", "semantic", "instances")
VOID_VALUES = (255, 65535)  # void in label files unless a class has the id


class LabelMapDataset(SegmentationDataset):
    """Images, each with a file of class ids. `files`: pairs of image and label file; the rest is
    [`SegmentationDataset`]'s.

    Args:
        void_values: label values that are void, beside 255 and 65535.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        class_names: Mapping[int, str],
        void_values: Collection[int] = (),
        cache: bool = False,
    ):
        super().__init__(class_names, "semantic", cache=cache)
        self.files = list(files)
        self.names = [image.stem for image, _ in self.files]
        self._classes = LabelValues(self.label_ids, void_values, self.void_id)

    def image_path(self, index: int) -> Path:
        return self.files[index][0]

    def annotation(self, index: int) -> str:
        return str(self.files[index][1])

    def raw_map(self, index: int) -> Tensor:
        return read_map(self.files[index][1])

    def _read_targets(self, index: int, size: tuple[int, int]) -> Targets:
        return Targets(self._classes(self.raw_map(index), self.annotation(index)))


class LabelValues:
    """Values of label files -> classes 0..K-1 (uint8 or int32), void as `void_id`.

    Args:
        label_ids: the file's value of each class.
        void_values: values that are void, beside 255 and 65535 where these are no class.
    """

    def __init__(self, label_ids: Sequence[int], void_values: Collection[int], void_id: int):
        check_void(label_ids, void_values)
        if outside := [value for value in (*label_ids, *void_values) if not 0 <= value < 2**16]:
            raise ValueError(f"Label values lie in 0..65535, got {some(outside)}.")
        self.label_ids = list(label_ids)
        self.void_values = sorted({*void_values, *VOID_VALUES} - set(label_ids))
        self._dtype = torch.uint8 if void_id == 255 else torch.int32
        self._classes = np.full(2**16, -1, dtype=np.int32)
        self._classes[self.void_values] = void_id
        self._classes[self.label_ids] = np.arange(len(self.label_ids))

    def __call__(self, values: Tensor, where: str) -> Tensor:
        """(H, W) -> (H, W). ValueError: a value is neither class nor void."""
        array = values.numpy()
        if array.dtype != np.uint8 and (array.min(initial=0) < 0 or array.max(initial=0) >= 2**16):
            raise ValueError(f"{where} holds values from {array.min()} to {array.max()}, labels lie in 0..65535.")
        classes = self._classes[array]
        if (unknown := classes < 0).any():
            wrong = np.unique(array[unknown]).tolist()
            raise ValueError(
                f"{where} holds label values {some(wrong, 10)} ({unknown.mean():.1%} of the pixels), which are no "
                f"class. The {len(self.label_ids)} classes have the values {self._known()}; void is "
                f"{', '.join(map(str, self.void_values))}. Name the missing classes, or give void_values."
            )
        return torch.from_numpy(classes).to(self._dtype)

    def _known(self) -> str:
        first, last = self.label_ids[0], self.label_ids[-1]
        gaps = "" if last - first + 1 == len(self.label_ids) else ", with gaps"
        return f"{first}..{last}{gaps}"


def check_void(label_ids: Iterable[int], void_values: Iterable[int]) -> None:
    if both := sorted(set(label_ids) & set(void_values)):
        raise ValueError(f"Label values {some(both)} are classes and void at once: give them one of the two meanings.")


def as_values(void_values: Any) -> set[int]:
    """The `void_values` of a reader, which can be a single one. ValueError: they are no integers."""
    values = [void_values] if isinstance(void_values, int) else void_values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"void_values={void_values!r}: needs label values, such as [255].")
    found = set(values)
    if wrong := [value for value in found if isinstance(value, bool) or not isinstance(value, Integral)]:
        raise ValueError(f"void_values: {some([repr(value) for value in wrong])} is no label value, such as 255.")
    return {int(value) for value in found}


class SegmentationFolder(LabelMapDataset):
    """Annotated images of one split.

    Layout::

        ROOT/labels.json              {"0": "sky", ...}: names of the classes
        ROOT/SPLIT/images/NAME.jpg    any format that Pillow reads
        ROOT/SPLIT/labels/NAME.png    class ids, 255 (or 65535) where not annotated     (semantic), or
        ROOT/SPLIT/instances/NAME.png 0 = background, every other id one segment         (instances)

    With instances, `labels.json` names one class of things. Background then is class 0, one stuff segment an
    image, and the things are class 1. `labels` may also be called `semantic`. Names are also read from Mapillary's
    `config.json`.

    Args:
        root: folder that holds `labels.json` and the splits.
        split: name of the split's folder, such as `"train"`; None where there are no splits.
        image_folder, label_folder: where the files lie below the root, such as `"images/{split}"`.
        instances: whether the label files hold instances; None: if their folder is called so.
        id2label: names of the classes by label value, or a JSON file of them; None: `labels.json`.
        void_values: label values that are void: beside 255 and 65535 in maps of classes, alone in maps of instances
            (255 for the border in Pascal VOC's SegmentationObject).
        background: name of class 0 of instance data.
        cache: keep decoded images and maps in memory after their first use; every loader worker has its own.

    Raises:
        FileNotFoundError: a folder, `labels.json`, a label map or an image is missing.
        ValueError: no images, two images of one name, no class names, or (on access) a file that cannot be
            read, a label map of another size than its image, in colour, or with values that are no class.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None,
        *,
        image_folder: str = "{split}/images",
        label_folder: str | None = None,
        instances: bool | None = None,
        id2label: Mapping[int, str] | str | Path | None = None,
        void_values: Collection[int] = (),
        background: str = "background",
        cache: bool = False,
    ):
        self.root, self.split = Path(root), split
        require_folder(self.root, "data set")
        images = below(self.root, image_folder, split)
        if "{split}/" in str(image_folder) and split:
            require_folder(self.root / split, "split", available=_folders(self.root))
        require_folder(images, "image", available=_folders(self.root))
        labels = below(self.root, label_folder, split) if label_folder else _only_label_folder(images.parent)
        require_folder(labels, "label", available=_folders(labels.parent) if labels.parent.is_dir() else None)
        names, no_classes = class_names_of(self.root, id2label)
        has_instances = holds_instances(labels, instances)
        void = as_values(void_values)
        if has_instances:
            if len(names) != 1:
                raise ValueError(
                    f"{id2label or self.root / 'labels.json'} names {len(names)} classes, but an instance map tells "
                    "only background from one class of things: name that one class."
                )
            names = {0: background, 1: next(iter(names.values()))}
        elif background != "background":
            raise ValueError(
                f"background={background!r} names class 0 of instance maps; {labels} holds maps of classes."
            )
        files = pair_files(images, labels)
        with naming(str(self.root)):
            super().__init__(files, names, () if has_instances else {*void, *no_classes}, cache)
        self._void_instances = void
        if has_instances:
            self.kind, self.has_instances, self.stuff_ids = "panoptic", True, [0]

    def _read_targets(self, index: int, size: tuple[int, int]) -> Targets:
        if not self.has_instances:
            return super()._read_targets(index, size)
        ids = int32_ids(self.raw_map(index), self.annotation(index))
        void = self._void_instances
        classes: dict[int, int | None] = {
            segment: VOID if segment in void else int(segment != 0) for segment in unique_ids(ids)
        }
        if negative := [segment for segment, label in classes.items() if segment < 0 and label != VOID]:
            raise ValueError(
                f"{self.annotation(index)} holds ids {some(negative)}: 0 is background, 1..n are instances."
            )
        return Targets(ids, classes)


def below(root: Path, pattern: str, split: str | None) -> Path:
    """`"images/{split}"` -> the folder below the root; without a split, the pattern without it."""
    return root / with_split(pattern, split).strip("/")


def holds_instances(labels: Path, instances: Any) -> bool:
    """Whether a folder of label maps holds instances: as `instances` says, or its name."""
    if instances is not None and not isinstance(instances, bool):
        raise ValueError(f"instances={instances!r}: needs true or false.")
    return labels.name == "instances" if instances is None else instances


def class_names_of(root: Path, id2label: Mapping[int, str] | str | Path | None) -> tuple[dict[int, str], list[int]]:
    """Names of the classes by label value, and values named as no class (in Mapillary's config.json)."""
    path = root / "config.json"
    if id2label is not None or (root / "labels.json").is_file() or not path.is_file():
        return read_class_names(root / "labels.json" if id2label is None else id2label), []
    content = read_json(path)
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list):
        raise ValueError(f"{path} is not Mapillary's, with a list of labels, and there is no {root / 'labels.json'}.")
    for place, label in enumerate(labels):
        if not isinstance(label, dict) or not isinstance(label.get("evaluate"), bool) or "readable" not in label:
            raise ValueError(
                f"{path} is not Mapillary's, with readable and evaluate (true or false) of each of its labels: "
                f"labels[{place}] is {shown(label)}. Or write {root / 'labels.json'}."
            )
    names = checked_names(((i, label["readable"]) for i, label in enumerate(labels) if label["evaluate"]), str(path))
    if not names:
        raise ValueError(f"{path} names no classes: evaluate is false of all its labels.")
    return names, sorted(set(range(len(labels))) - set(names))


def _only_label_folder(folder: Path) -> Path:
    found = [folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(
            f"{folder} needs one of the folders {', '.join(LABEL_FOLDERS)} beside images, found: {names}. "
            "Where there are several or others, choose with label_folder, for instance '{split}/labels'."
        )
    return found[0]


def _folders(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir()]


class Ade20k(SegmentationFolder):
    """ADE20K as of the scene parsing challenge (`ADEChallengeData2016`).

    Layout::

        ROOT/images/SPLIT/NAME.jpg          SPLIT: training, validation
        ROOT/annotations/SPLIT/NAME.png     0 = other (void), 1..150 = classes 0..149
        ROOT/objectInfo150.txt              names; else labels.json, or `id2label` (by label value, 1..150)

    Args and errors as for [`SegmentationFolder`].
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "training",
        *,
        id2label: Mapping[int, str] | str | Path | None = None,
        cache: bool = False,
    ):
        super().__init__(
            root,
            split,
            image_folder="images/{split}",
            label_folder="annotations/{split}",
            id2label=ade20k_names(Path(root), id2label),
            void_values=(0,),
            cache=cache,
        )


def ade20k_names(root: Path, id2label: Mapping[int, str] | str | Path | None) -> dict[int, str]:
    """Names of the classes by label value. ValueError: 0, which is void in ADE20K, is one of them."""
    table = root / "objectInfo150.txt"
    if id2label is None and table.is_file():
        names = names_of_table(table)
    else:
        names, _ = class_names_of(root, id2label)
    if 0 in names:
        raise ValueError(
            f"{root}: in layout ade20k label value 0 is void, but it is named as class {names[0]!r}. Of other data in "
            'folders images/SPLIT and annotations/SPLIT the layout is "folder", with the options '
            'image_folder="images/{split}" and label_folder="annotations/{split}".'
        )
    return names


def names_of_table(path: Path) -> dict[int, str]:
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

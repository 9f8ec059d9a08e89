"""A data set of any layout, which is found by looking at the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .cityscapes import Cityscapes
from .coco_files import find_jsons, json_candidates
from .coco_instances import CocoInstances
from .coco_panoptic import CocoPanoptic
from .dataset import SegmentationDataset
from .files import require_folder
from .folder_dataset import LABEL_FOLDERS, Ade20k, SegmentationFolder


class Layout(NamedTuple):
    reader: Callable[..., SegmentationDataset]
    found: Callable[[Path, str | None], bool]
    looked_for: Callable[[Path, str | None], list[Path]]


def _all_are_folders(paths: list[Path]) -> bool:
    return all(path.is_dir() for path in paths)


def _cityscapes(root: Path, split: str | None) -> list[Path]:
    return [root / "leftImg8bit" / (split or ""), root / "gtFine" / (split or "")]


def _ade20k(root: Path, split: str | None) -> list[Path]:
    return [root / "images" / (split or ""), root / "annotations" / (split or "")]


def _folder(root: Path, split: str | None) -> list[Path]:
    return [root / (split or "") / name for name in ("images", *LABEL_FOLDERS)]


def _is_folder(root: Path, split: str | None) -> bool:
    images, *labels = _folder(root, split)
    return images.is_dir() and any(path.is_dir() for path in labels)


# In the order of the search: a panoptic json says more than the instances or label maps beside it.
LAYOUTS: dict[str, Layout] = {
    "cityscapes": Layout(Cityscapes, lambda root, split: _all_are_folders(_cityscapes(root, split)), _cityscapes),
    "ade20k": Layout(Ade20k, lambda root, split: bool(split) and _all_are_folders(_ade20k(root, split)), _ade20k),
    "coco_panoptic": Layout(
        CocoPanoptic,
        lambda root, split: bool(find_jsons(root, split, "panoptic")),
        lambda root, split: json_candidates(root, split, "panoptic"),
    ),
    "folder": Layout(SegmentationFolder, _is_folder, _folder),
    "coco_instances": Layout(
        CocoInstances,
        lambda root, split: bool(find_jsons(root, split, "instances")),
        lambda root, split: json_candidates(root, split, "instances"),
    ),
}


def open_dataset(
    root: str | Path, split: str | None = None, layout: str | None = None, cache: bool = False, **options: Any
) -> SegmentationDataset:
    """The annotated images of a split.

    Args:
        root: folder of the data.
        split: such as "train"; None where there are no splits.
        layout: "cityscapes", "ade20k", "coco_panoptic", "folder" or "coco_instances"; None: the first of these, in
            this order, whose files are there.
        cache: keep what was read in memory.
        options: of the layout's reader, such as `background="class"` of [`CocoInstances`].

    Raises:
        FileNotFoundError: there is no such folder, or it has no known layout; the message lists what was looked for.
        ValueError: an unknown layout; what the reader finds wrong.
        TypeError: an option that the reader does not have.
    """
    root = Path(root)
    require_folder(root, "data set")
    was_found = layout is None
    layout = find_layout(root, split) if layout is None else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: the layouts are {', '.join(LAYOUTS)}.")
    try:
        return LAYOUTS[layout].reader(root, split, cache=cache, **options)
    except TypeError as error:
        raise TypeError(f"Layout {layout} of {root}: {error}") from error
    except (FileNotFoundError, ValueError) as error:
        if not (was_found and layout == "ade20k"):  # data of other sets lies in folders of these names too
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error} (Layout {layout} was found by looking at the names of the folders.)") from error


def find_layout(root: Path, split: str | None) -> str:
    """Name of the layout of a split. FileNotFoundError: none is known."""
    for name, layout in LAYOUTS.items():
        if layout.found(root, split):
            return name
    looked = "\n".join(
        f"  {name}: {', '.join(str(path.relative_to(root)) for path in layout.looked_for(root, split))}"
        for name, layout in LAYOUTS.items()
    )
    there = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"No known layout in {root}, split {split}. Looked below it for\n{looked}\nIt holds: {there}."
    )

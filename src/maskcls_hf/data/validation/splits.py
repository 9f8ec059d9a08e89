"""Which layout and splits a folder has."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..coco_files import find_jsons
from ..files import with_split
from ..folder_dataset import LABEL_FOLDERS, below
from ..open_dataset import LAYOUTS

FIRST = ("train", "training", "val", "valid", "validation", "test")


def find_splits(root: Path, layout: str | None, options: Mapping[str, Any]) -> tuple[str | None, list[str | None]]:
    """Layout and its splits, training first. A split of the folder layout may lack images or labels; (None, [])
    where nothing is known."""
    for name in [layout] if layout else LAYOUTS:
        splits = {s for s in _candidates(root, name, options) if _is_split(root, name, s, options)}
        if splits:
            splits = _with_files_of_their_own(root, name, splits, options)
            parts = {split for split in _candidates(root, name, options) if _is_part(root, name, split)}
            return name, [*sorted({*splits, *parts}, key=_rank)]
        if _is_split(root, name, None, options):
            return name, [None]
    for name in [layout] if layout else LAYOUTS:
        splits = {s for s in _candidates(root, name, options) if _is_part(root, name, s)}
        if splits or _is_part(root, name, None):
            return name, [*sorted(splits, key=_rank)] or [None]
    return layout, []


def _with_files_of_their_own(root: Path, layout: str, splits: set[str], options: Mapping[str, Any]) -> set[str]:
    """Without "train" where that is the json of "train2017"."""
    if not layout.startswith("coco_") or options.get("annotations"):
        return splits
    kind: Any = layout.removeprefix("coco_")
    return set({tuple(find_jsons(root, split, kind)): split for split in sorted(splits, key=len)}.values())


def layout_of(root: Path, splits: list[str | None], options: Mapping[str, Any]) -> str | None:
    """Layout of splits whose names are given."""
    for is_layout in (lambda name, split: _is_split(root, name, split, options), lambda *a: _is_part(root, *a)):
        for name in LAYOUTS:
            if any(is_layout(name, split) for split in splits):
                return name
    return None


def _rank(split: str) -> tuple[int, str]:
    place = next((i for i, name in enumerate(FIRST) if split.startswith(name)), len(FIRST))
    return place, split


def _candidates(root: Path, layout: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Names that can be splits."""
    pattern = {"cityscapes": "leftImg8bit/{split}", "ade20k": "images/{split}"}.get(layout)
    pattern = str(options.get("image_folder") or pattern or "{split}")
    if "{split}" in pattern:
        folder = root / pattern.split("{split}")[0]
        yield from (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    kind = layout.removeprefix("coco_")
    if kind == layout:
        return
    if pattern := options.get("annotations"):
        yield from _splits_of(str(root / str(pattern)))
        return
    yield from (path.stem.removeprefix(f"{kind}_") for path in (root / "annotations").glob(f"{kind}_*.json"))
    for path in root.glob(f"{kind}_*.json"):
        # the sample data of panopticapi has panoptic_coco_categories.json, too: a split has maps
        if kind == "instances" or path.with_suffix("").is_dir():
            yield path.stem.removeprefix(f"{kind}_")
    for path in (*root.glob("annotations/*.json"), *root.glob("*.json")):  # train.json, beside labels.json and others
        images = root / path.stem, root / "images" / path.stem
        if re.fullmatch(f"({'|'.join(FIRST)})[0-9]*", path.stem) or any(folder.is_dir() for folder in images):
            yield path.stem


def _splits_of(pattern: str) -> Iterator[str]:
    """What `{split}` can be in the path of a file."""
    split = re.escape("{split}")
    form = re.escape(pattern).replace(split, "(.+)", 1).replace(split, r"\1")
    for path in glob.glob("*".join(map(glob.escape, pattern.split("{split}")))):
        if (match := re.fullmatch(form, path)) and match.groups():
            yield match[1]


def _is_split(root: Path, layout: str, split: str | None, options: Mapping[str, Any]) -> bool:
    if layout == "folder" and options.get("image_folder"):
        return bool(split) and below(root, str(options["image_folder"]), split).is_dir()
    if layout.startswith("coco_") and (pattern := options.get("annotations")):
        pattern = str(pattern)
        return bool(split) == ("{split}" in pattern) and (root / with_split(pattern, split)).is_file()
    return LAYOUTS[layout].found(root, split)


def _is_part(root: Path, layout: str, split: str | None) -> bool:
    """Whether there is at least a part of it."""
    if layout in ("cityscapes", "ade20k"):
        return bool(split) and any(path.is_dir() for path in LAYOUTS[layout].looked_for(root, split))
    if layout == "folder":
        return any((root / (split or "") / name).is_dir() for name in ("images", *LABEL_FOLDERS))
    return False

"""What the COCO layouts share: finding the files, reading the json once, keeping it in few bytes."""

from __future__ import annotations

import glob
import os
import pickle
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .coco_records import CocoContent, CocoKind
from .dataset import Kind, SegmentationDataset, check_size
from .files import read_json, require_folder, shown, some, with_split

TOLERATED = ("double_annotation_id",)  # no error for `validate` either
NAMES_TRIED = 50  # names of the json by which the folder of its files is looked for


class Packed:
    """A list of Python objects in one block of bytes: small, and shared by forked loader workers without copies."""

    def __init__(self, items: Iterable[Any]):
        packed = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([len(item) for item in packed], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].tobytes())


class CocoDataset(SegmentationDataset):
    """Images of a COCO json with its categories; subclasses read the annotations.

    Args:
        root: folder of the data, out of which no name of the json leads.
        json_path: the file.
        content: what it holds, see [`read_coco`].
        image_folder: of the images.
        class_names, kind, stuff, cache: see [`SegmentationDataset`].
    """

    def __init__(
        self,
        root: Path,
        json_path: Path,
        content: CocoContent,
        image_folder: Path,
        class_names: Mapping[int, str],
        kind: Kind,
        stuff: Collection[int],
        cache: bool,
    ):
        super().__init__(class_names, kind, stuff=stuff, cache=cache)
        self.json_path, self.image_folder = json_path, image_folder
        images = content.images.values()
        self.file_names = require_files(
            root, image_folder, [image["file_name"] for image in images], f"images of {json_path}"
        )
        self.names = [str(Path(name).with_suffix("")) for name in self.file_names]
        self.image_ids = list(content.images)
        self._sizes = [(image["height"], image["width"]) for image in images]

    def image_path(self, index: int) -> Path:
        return self.image_folder / self.file_names[index]

    def sizes(self) -> list[tuple[int, int]]:
        return list(self._sizes)

    def record(self, index: int) -> str:
        """The record of an image, for messages."""
        return f"{self.json_path}, image {shown(self.image_ids[index])} ({self.file_names[index]})"

    def check_record(self, index: int, size: tuple[int, int]) -> None:
        """ValueError unless the json has the size (height, width) of the image itself."""
        check_size(self._sizes[index], size, self.record(index), str(self.image_path(index)))


def read_coco(path: Path, kind: CocoKind) -> CocoContent:
    """A COCO json. FileNotFoundError or ValueError, with the path: what `validate` calls an error."""

    def refuse(rule: str, message: str, file: Any) -> None:
        if rule not in TOLERATED:
            raise ValueError(f"{path}: {message}.")

    return CocoContent(read_json(path), kind, refuse)


class NamedFiles:
    """The files of a folder, by the names that a json has for them.

    Args:
        root: folder of the data: no name may lead out of it, or out of `folder`.
    """

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        self._there = _files_of(folder)
        self._listed: dict[Path, dict[str, list[str]]] = {}  # files of each folder by what their names are compared by

    def find(self, name: str) -> str:
        """The name on the disk, which can be in another Unicode form.

        Raises:
            FileNotFoundError: there is no such file; says what is near.
            ValueError: the name leads out of the data.
        """
        if name in self._there:
            return name
        path = self.folder / name
        inside = os.path.abspath(path)
        if not any(Path(inside).is_relative_to(os.path.abspath(top)) for top in (self.root, self.folder)):
            raise ValueError(f"{name} leads out of the data folder")
        if os.path.isfile(path):  # False for names that are too long, too
            return name
        if path.parent not in self._listed:
            self._listed[path.parent] = _by_letters(_files_of(path.parent))
        near = self._listed[path.parent].get(_letters(path.name), [])
        same = [other for other in near if _composed(other) == _composed(path.name)]
        if len(same) == 1:
            return str(Path(name).with_name(same[0]))
        hint = ""
        if near:
            hint = f" (there is {near[0]}: small and capital letters differ)"
        elif "\\" in name:
            hint = " (written with backslashes: write / between folders)"
        elif os.path.isdir(path):
            hint = " (a folder)"
        raise FileNotFoundError(f"{name}{hint}")


def _files_of(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_file()} if os.path.isdir(folder) else set()


def _by_letters(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(_letters(name), []).append(name)
    return found


def _letters(name: str) -> str:
    """The same for names that differ in their Unicode form, or in small and capital letters, alone."""
    return _composed(name).lower()


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def require_files(root: Path, folder: Path, names: Iterable[str], what: str) -> list[str]:
    """The names of files as the folder has them.

    Raises:
        FileNotFoundError: the folder lacks some; names them.
        ValueError: a name leads out of the data.
    """
    require_folder(folder, "image")
    files, found, missing = NamedFiles(root, folder), [], []
    for name in names:
        try:
            found.append(files.find(name))
        except FileNotFoundError as error:
            missing.append(str(error))
        except ValueError as error:
            raise ValueError(f"{what}: file_name {error}.") from None
    if missing:
        raise FileNotFoundError(f"{len(missing)} {what} are missing from {folder}: {some(missing)}.")
    return found


def find_jsons(root: Path, split: str | None, kind: CocoKind) -> list[Path]:
    """The jsons that can be that of a split."""
    found = [path for path in json_candidates(root, split, kind) if path.is_file()]
    if found:
        return found
    if split:  # with the year behind it, such as instances_train2017.json
        pattern = f"{kind}_{glob.escape(split)}{'[0-9]' * 4}.json"
        return [path for folder in (root / "annotations", root) for path in sorted(folder.glob(pattern))]
    # a panoptic json beside the folder of its maps, such as panoptic_examples.json beside panoptic_examples
    return [path for path in sorted(root.glob(f"{kind}_*.json")) if path.with_suffix("").is_dir()]


def choose_json(root: Path, split: str | None, kind: CocoKind, annotations: str | None) -> Path:
    """The json of a split; `annotations`: where it lies below the root, None: it is looked for.

    Raises:
        FileNotFoundError: there is none; says where it was looked for.
        ValueError: there are several; lists them.
    """
    if annotations:
        return root / with_split(annotations, split)
    found = find_jsons(root, split, kind)
    if not found:
        looked = ", ".join(str(candidate) for candidate in json_candidates(root, split, kind))
        what = {"instances": "instances", "panoptic": "panoptic json"}[kind]
        raise FileNotFoundError(f"No COCO {what} in {root}, split {split}: looked for {looked}.")
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(root)) for path in found)
        raise ValueError(
            f"{root}, split {split}, has several files of COCO {kind}: {several}. Choose by the option annotations."
        )
    return found[0]


def json_candidates(root: Path, split: str | None, kind: CocoKind) -> list[Path]:
    """Where the json of a split can be."""
    if not split:
        return [root / f"{kind}.json", root / "annotations" / f"{kind}.json"]
    names = [f"{split}/{kind}.json", f"annotations/{kind}_{split}.json", f"{kind}_{split}.json"]
    if kind == "instances":
        names += [f"{split}/_annotations.coco.json", f"annotations/{split}.json", f"{split}.json"]
    return [root / name for name in names]


def find_image_folder(
    root: Path, split: str | None, json_path: Path, kind: CocoKind, names: Sequence[str], given: str | None
) -> Path:
    """The folder that has images of the json; `given`: where it lies below the root."""
    if given:
        return root / with_split(given, split)
    own = json_path.stem.removeprefix(f"{kind}_")  # such as train2017
    folders = [json_path.parent / "images"]
    if split:
        folders += [root / split / "images", root / "images" / split, root / split]
    folders += [root / "images", root / "input_images", json_path.parent]
    for name in (own, own.rstrip("0123456789")):
        if name not in ("", kind):
            folders += [root / name, root / "images" / name]
    return _first_with(root, folders, names, f"image of {json_path}", "image_folder")


def find_map_folder(root: Path, split: str | None, json_path: Path, names: Sequence[str], given: str | None) -> Path:
    """The folder that has maps of a panoptic json; `given`: where it lies below the root."""
    if given:
        return root / with_split(given, split)
    folders = [
        json_path.with_suffix(""),
        json_path.parent.parent / json_path.stem,
        json_path.parent / "panoptic",
        json_path.parent / "annotations",
    ]
    return _first_with(root, folders, names, f"panoptic map of {json_path}", "map_folder")


def _first_with(root: Path, folders: list[Path], names: Sequence[str], what: str, option: str) -> Path:
    folders = list(dict.fromkeys(folders))
    for name in names[:NAMES_TRIED]:
        for folder in folders:
            if os.path.isfile(folder / name):
                return folder
    files = [NamedFiles(root, folder) for folder in folders]
    for name in names[:NAMES_TRIED]:
        for there in files:
            with suppress(FileNotFoundError, ValueError):
                there.find(name)
                return there.folder
    looked = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"No folder with {names[0]}, the first {what}. Looked in {looked}; or give {option}.")

"""What the COCO layouts share: finding the files, reading the json once, keeping it in few bytes."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Kind, SegmentationDataset
from .files import read_json, require_folder, some


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
        json_path: the file.
        content: what it holds, see [`read_coco`].
        image_folder: of the images.
        class_names, kind, stuff, cache: see [`SegmentationDataset`].
    """

    def __init__(
        self,
        json_path: Path,
        content: Mapping[str, Any],
        image_folder: Path,
        class_names: Mapping[int, str],
        kind: Kind,
        stuff: Collection[int],
        cache: bool,
    ):
        super().__init__(class_names, kind, stuff=stuff, cache=cache)
        self.json_path, self.image_folder = json_path, image_folder
        images = content["images"]
        self.file_names = [str(image["file_name"]) for image in images]
        self.names = [str(Path(name).with_suffix("")) for name in self.file_names]
        self.image_ids = [image["id"] for image in images]
        self._sizes = [(int(image["height"]), int(image["width"])) for image in images]
        if not images:
            raise ValueError(f"{json_path} lists no images.")
        require_files(image_folder, self.file_names, f"images of {json_path}")

    def image_path(self, index: int) -> Path:
        return self.image_folder / self.file_names[index]

    def sizes(self) -> list[tuple[int, int]]:
        return list(self._sizes)

    def grouped(self, annotations: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
        """Annotations by image id. ValueError: one is of no image or no category of the file."""
        of_image: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in self.image_ids}
        if len(of_image) < len(self.image_ids):
            raise ValueError(f"{self.json_path}: several images have one id.")
        for annotation in annotations:
            if annotation["image_id"] not in of_image:
                raise ValueError(
                    f"{self.json_path}: annotation {annotation.get('id', '')} is of image {annotation['image_id']}, "
                    "which the file does not list."
                )
            of_image[annotation["image_id"]].append(annotation)
        return of_image

    def check_categories(self, used: Iterable[int], known: Collection[int]) -> None:
        if missing := sorted(set(used) - set(known)):
            raise ValueError(f"{self.json_path}: categories {some(missing)} of annotations are not in its categories.")


def read_coco(path: Path) -> dict[str, Any]:
    """A COCO json with `images`, `annotations` and `categories`. FileNotFoundError or ValueError, with the path."""
    content = read_json(path)
    needed = ("images", "annotations", "categories")
    missing = [key for key in needed if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path} is no COCO annotation file: it lacks {', '.join(missing)}.")
    fields = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}
    for key, names in fields.items():
        for record in content[key]:
            if absent := [name for name in names if name not in record]:
                raise ValueError(f"{path}: one of its {key} has no {', '.join(absent)}: {str(record)[:200]}")
    return content


def require_files(folder: Path, names: Iterable[str], what: str) -> None:
    """FileNotFoundError that names the files which the folder lacks."""
    require_folder(folder, "image")
    there = {path.name for path in folder.iterdir()}
    if missing := [name for name in names if name not in there and not (folder / name).is_file()]:
        raise FileNotFoundError(f"{len(missing)} {what} are missing from {folder}: {some(missing)}.")


def find_json(root: Path, split: str | None, kind: str) -> Path | None:
    """The json of a split; `kind` is "instances" or "panoptic". None: there is none."""
    return next((path for path in json_candidates(root, split, kind) if path.is_file()), None)


def require_json(root: Path, split: str | None, kind: str) -> Path:
    """As [`find_json`].

    Raises:
        FileNotFoundError: there is none; says where it was looked for.
    """
    path = find_json(root, split, kind)
    if path is None:
        looked = ", ".join(str(candidate) for candidate in json_candidates(root, split, kind))
        what = {"instances": "instances", "panoptic": "panoptic json"}[kind]
        raise FileNotFoundError(f"No COCO {what} in {root}, split {split}: looked for {looked}.")
    return path


def json_candidates(root: Path, split: str | None, kind: str) -> Iterator[Path]:
    """Where the json of a split can be."""
    if split:
        yield root / split / f"{kind}.json"
        yield root / "annotations" / f"{kind}_{split}.json"
        yield root / f"{kind}_{split}.json"
        if kind == "instances":
            yield root / split / "_annotations.coco.json"
        return
    yield root / f"{kind}.json"
    yield root / "annotations" / f"{kind}.json"
    # a panoptic json beside the folder of its maps, such as panoptic_examples.json beside panoptic_examples
    yield from (path for path in sorted(root.glob(f"{kind}_*.json")) if path.with_suffix("").is_dir())


def find_image_folder(root: Path, split: str | None, json_path: Path, file_name: str) -> Path:
    """The folder that has an image of the json."""
    split_folders = [root / split / "images", root / "images" / split, root / split] if split else []
    folders = [
        json_path.parent / "images",
        *split_folders,
        root / "images",
        root / "input_images",
        json_path.parent,
    ]
    return _first_with(folders, file_name, f"image of {json_path}", "image_folder")


def find_map_folder(json_path: Path, file_name: str) -> Path:
    """The folder that has a map of a panoptic json."""
    folders = [
        json_path.with_suffix(""),
        json_path.parent.parent / json_path.stem,
        json_path.parent / "panoptic",
        json_path.parent / "annotations",
    ]
    return _first_with(folders, file_name, f"panoptic map of {json_path}", "map_folder")


def _first_with(folders: list[Path], file_name: str, what: str, option: str) -> Path:
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise FileNotFoundError(f"No folder with {file_name}, the first {what}. Looked in {looked}; or give {option}.")

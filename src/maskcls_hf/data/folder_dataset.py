"""Folders of images with label maps or instance maps, as a map-style data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_FOLDERS = ("labels", "instances")


class Sample(TypedDict):
    """One annotated image.

    `image` (3, H, W) uint8. `segmentation_map` (1, H, W): class ids (uint8), or segment ids (int32) where
    `instance_id_to_semantic_id` says which class each segment has.
    """

    image: tv_tensors.Image
    segmentation_map: tv_tensors.Mask
    instance_id_to_semantic_id: dict[int, int] | None
    name: str


class SegmentationFolder(Dataset[Sample]):
    """Annotated images of one split.

    Layout::

        ROOT/labels.json              {"0": "sky", ...}: names of the classes
        ROOT/SPLIT/images/NAME.jpg    any format that Pillow reads
        ROOT/SPLIT/labels/NAME.png    8-bit class ids, void where not annotated         (semantic), or
        ROOT/SPLIT/instances/NAME.png 8- or 16-bit, 0 = background, 1..n = one segment  (instances)

    With instances, `labels.json` names one class of things. Background then is class 0, one stuff segment an
    image, and the things are class 1.

    Args:
        root: folder that holds `labels.json` and the splits.
        split: name of the split's folder, such as `"train"`.
        background: name of class 0 of instance data.
        cache: keep decoded images and maps in memory after their first use; every loader worker has its own.

    Attributes:
        id2label (`dict[int, str]`): names of the classes.
        stuff_ids (`list[int]`): classes that are one segment an image; for semantic data all of them.

    Raises:
        FileNotFoundError: a folder, `labels.json`, a label map or an image is missing.
        ValueError: no images, two images of one name, no class names, or (on access) a file that cannot be
            read, a label map of another size than its image or in colour.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        background: str = "background",
        cache: bool = False,
    ):
        self.root, self.split = Path(root), split
        folder = self.root / split
        _require_folder(self.root, "data set")
        _require_folder(folder, "split", available=[path.name for path in self.root.iterdir()])
        _require_folder(folder / "images", "image")
        label_folders = [folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()]
        if len(label_folders) != 1:
            raise FileNotFoundError(
                f"{folder} needs exactly one of the folders {' and '.join(LABEL_FOLDERS)} beside images, "
                f"found {len(label_folders)}."
            )
        self.has_instances = label_folders[0].name == "instances"
        self.files = _pair_files(folder / "images", label_folders[0])
        names = _read_class_names(self.root / "labels.json")
        if self.has_instances:
            if len(names) != 1:
                raise ValueError(
                    f"{self.root / 'labels.json'} names {len(names)} classes, but an instance map tells only "
                    "background from one class of things: name that one class."
                )
            names = {0: background, 1: next(iter(names.values()))}
        self.id2label = names
        self.stuff_ids = [0] if self.has_instances else sorted(names)
        self._cache: dict[int, tuple[tv_tensors.Image, tv_tensors.Mask]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if self._cache is None:
            image, segmentation_map = self._read(index)
        else:
            if index not in self._cache:
                self._cache[index] = self._read(index)
            image, segmentation_map = self._cache[index]
        return Sample(
            image=image,
            segmentation_map=segmentation_map,
            instance_id_to_semantic_id=self._classes_of_segments(segmentation_map),
            name=self.files[index][0].stem,
        )

    def _read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, map_path = self.files[index]
        pixels = np.array(ImageOps.exif_transpose(_open(image_path)).convert("RGB"))
        ids = np.array(_open(map_path))
        if ids.ndim != 2:
            raise ValueError(f"{map_path} has {ids.shape[-1]} channels, a map of ids has one.")
        if ids.shape != pixels.shape[:2]:
            raise ValueError(
                f"{map_path} is {ids.shape[1]} x {ids.shape[0]} pixels, its image {image_path} "
                f"{pixels.shape[1]} x {pixels.shape[0]}."
            )
        if self.has_instances:
            ids = ids.astype(np.int32)
        return (
            tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()),
            tv_tensors.Mask(torch.from_numpy(ids)[None]),
        )

    def _classes_of_segments(self, segmentation_map: torch.Tensor) -> dict[int, int] | None:
        if not self.has_instances:
            return None
        return {segment: int(segment != 0) for segment in range(int(segmentation_map.max()) + 1)}


def _require_folder(path: Path, kind: str, available: list[str] | None = None) -> None:
    if not path.is_dir():
        hint = f" There are: {', '.join(sorted(available)) or 'none'}." if available is not None else ""
        raise FileNotFoundError(f"No {kind} folder {path}.{hint}")


def _pair_files(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Each image of a folder with the label map of the same name, sorted by name."""
    image_paths = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not image_paths:
        raise ValueError(f"No images in {images} (looked for {', '.join(IMAGE_SUFFIXES)}).")
    stems = [path.stem for path in image_paths]
    if len(set(stems)) < len(stems):
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        raise ValueError(f"Images of the same name in {images}: {_some(twice)}.")
    label_stems = {path.stem for path in labels.glob("*.png")}
    if missing := sorted(set(stems) - label_stems):
        raise FileNotFoundError(f"{len(missing)} images have no PNG in {labels}: {_some(missing)}.")
    if extra := sorted(label_stems - set(stems)):
        raise FileNotFoundError(f"{len(extra)} label maps have no image in {images}: {_some(extra)}.")
    return [(path, labels / f"{path.stem}.png") for path in image_paths]


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _read_class_names(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise FileNotFoundError(f'No {path}: it names the classes, like {{"0": "sky", "1": "road"}}.')
    try:
        names = {int(label_id): str(name) for label_id, name in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not a JSON object like {{"0": "sky", "1": "road"}}: {error}') from error
    if not names:
        raise ValueError(f"{path} names no classes.")
    return names


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return image

"""One binary mask for each class or object of an image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import ReportFault, refuse
from .drawing import draw_file
from .shapes import Annotated, Background, Shape, ShapeDataset, is_image, split_folder, usual_splits

IMAGE_FOLDERS = ("images", "image", "img", "imgs", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "png")
PART = r"_(?:class_(?P<name>.+)|object(?P<number>[0-9]+)(?:_(?P<object_name>.+))?)"
BY_TASK = r"task-[0-9]+-annotation-[0-9]+-.*"  # Label Studio's


class MaskFiles(ShapeDataset):
    """Images, each with a file for each class, or object, that is in it, as RectLabel exports them.

    Layout: `images/NAME.png` with `masks/NAME_class_CLASS.png`, or `masks/NAME_object0.png`. Where the name of an
    image begins with that of another one, the longer one counts. An image without masks is background.

    Args:
        root: folder of the data.
        split: a folder in it; None: there are none.
        class_name: of objects whose files do not say it.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        ValueError: a mask of no image, or (on access) of another size.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        class_name: str = "object",
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split = Path(root), split
        images, masks = _folders(split_folder(self.root, split) or self.root)
        files = sorted(path for path in masks.iterdir() if is_image(path)) if masks else []
        parts: dict[Path, list[tuple[str, Path]]] = {}
        if images:
            is_mask = re.compile(rf".+{PART}")
            parts = {
                path: [] for path in sorted(images.iterdir()) if is_image(path) and not is_mask.fullmatch(path.stem)
            }
        image_of = {path.stem: path for path in parts}
        for path in files:
            if path in parts:
                continue
            stems = [path.stem[:end] for end in range(len(path.stem), 0, -1) if path.stem[:end] in image_of]
            matches = ((stem, re.fullmatch(PART, path.stem[len(stem) :])) for stem in stems)
            stem, match = next((pair for pair in matches if pair[1]), ("", None))
            if match is None:
                hint = ""
                if re.fullmatch(BY_TASK, path.stem):
                    hint = ": Label Studio names them by its tasks; export the JSON, which says of which images"
                error = ValueError(f"{path} is the mask of no image in {images}{hint}.")
                report("label_without_image", f"a mask of no image{hint}", path, error)
                continue
            parts[image_of[stem]].append((match["name"] or match["object_name"] or class_name, path))
        names = dict(enumerate(sorted({name for found in parts.values() for name, _ in found})))
        labels = {name: label for label, name in names.items()}
        annotated = [
            Annotated(
                image.stem,
                image,
                f"masks of {image.stem} in {masks}",
                [Shape(labels[name], partial(draw_file, path), path.name) for name, path in found],
            )
            for image, found in parts.items()
        ]
        super().__init__(self.root, annotated, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The name of the mask of a class."""
        return [root / (split or "") / "masks" / "NAME_class_CLASS.png"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether a file is named like the mask of a class or object, or of a task of Label Studio."""
        folder = split_folder(root, split)
        masks = _folders(folder)[1] if folder else None
        stems = (path.stem for path in masks.iterdir() if is_image(path)) if masks else ()
        return any(re.fullmatch(rf".+{PART}|{BY_TASK}", stem) for stem in stems)

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Folders with a usual name of a split that hold such masks."""
        return [name for name in usual_splits(root) if cls.find(root, name, options)]


def _folders(folder: Path) -> tuple[Path | None, Path | None]:
    """Of images and masks, which can be one."""
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), folder)
    masks = next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), images)
    return images, masks


class ObjectFolders(ShapeDataset):
    """A folder for each image, with a file for each object, as in the Data Science Bowl of 2018.

    Layout: `SPLIT/ID/images/ID.png` with `SPLIT/ID/masks/*.png`, or the same without a split. Objects may overlap. A
    mask without a pixel is none.

    Args:
        root: folder of the data.
        split: such as "stage1_train"; None: all images.
        class_name: of the objects; None: "nucleus" in the Bowl's folders, else "object".
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        ValueError: a folder without its image, or (on access) a mask of another size.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        class_name: str | None = None,
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split = Path(root), split
        folders = _object_folders(self.root, split)
        is_bowl = any(part.startswith("stage1_") for folder in folders for part in folder.parts)
        images = []
        for folder in folders:
            found = sorted(path for path in (folder / "images").iterdir() if is_image(path))
            if len(found) != 1:
                error = ValueError(f"{folder / 'images'} holds {len(found)} images, not one.")
                report("image_without_label", f"{len(found)} images, not one", folder / "images", error)
                continue
            masks = sorted(path for path in (folder / "masks").iterdir() if is_image(path))
            shapes = [Shape(0, partial(draw_file, path), path.name) for path in masks]
            images.append(Annotated(found[0].stem, found[0], str(folder / "masks"), shapes))
        names = {0: class_name or ("nucleus" if is_bowl else "object")}
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The folder of the masks of an image."""
        return [root / (split or "") / "NAME" / "masks"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether the first five folders with `images` and `masks` hold one image each."""
        folders = _object_folders(root, split)[:5]
        return bool(folders) and all(len(list(filter(is_image, (f / "images").iterdir()))) == 1 for f in folders)

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Folders that hold a folder for each image."""
        folders = [path.name for path in root.iterdir() if path.is_dir()]
        return [name for name in folders if cls.find(root, name, options)]


def _object_folders(root: Path, split: str | None) -> list[Path]:
    """Folders with the images and masks of one image each; of all splits without one."""
    tops = [root / split] if split else [root, *(path for path in root.iterdir() if path.is_dir())]
    found = (path for top in tops if top.is_dir() for path in sorted(top.iterdir()))
    return [path for path in found if (path / "masks").is_dir() and (path / "images").is_dir()]

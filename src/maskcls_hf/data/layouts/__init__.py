"""Layouts of annotated images, by name: a class each, that finds, reads and checks; the package's own and yours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.configuration_maskcls import Registry
from ...utils.places import require_folder
from ..dataset import SegmentationDataset
from .ade20k import Ade20k
from .binary_masks import MaskFiles, ObjectFolders
from .cityscapes import Cityscapes
from .coco_instances import CocoInstances
from .coco_panoptic import CocoPanoptic
from .colors import ColorMaps
from .cvat import Cvat
from .folder import SegmentationFolder
from .geo import GeoVectors
from .label_studio import LabelStudio
from .labelme import LabelMe
from .supervisely import Supervisely
from .table import SegmentationStream, SegmentationTable
from .voc import PascalVoc
from .yolo import YoloSeg

_FIRST_SPLITS = ("train", "training", "val", "valid", "validation", "test")  # the order in which splits are reported


class Layouts(Registry):
    """Layouts by their names; where files are looked for, they are asked in this order."""

    def register(self, name: str, part: type[SegmentationDataset]) -> None:
        """Makes a subclass of [`SegmentationDataset`] known to [`open_dataset`], recipes and `maskcls validate`.

        Args:
            name: of the layout, as `--layout` and recipes give it.
            part: the subclass.

        Raises:
            ValueError: the name is none, or that of another layout.
            TypeError: the class is no such subclass.
        """
        if not (isinstance(part, type) and issubclass(part, SegmentationDataset)):
            raise TypeError(f"Layout {name!r}: {part!r} is no subclass of maskcls_hf.data.SegmentationDataset.")
        super().register(name, part)


LAYOUTS = Layouts("layout")
register_layout = LAYOUTS.register
register_layout("yolo", YoloSeg)  # of annotation tools, whose own files tell them
register_layout("cvat", Cvat)
register_layout("label_studio", LabelStudio)
register_layout("supervisely", Supervisely)
register_layout("voc", PascalVoc)
register_layout("geo", GeoVectors)
register_layout("mask_files", MaskFiles)
register_layout("object_folders", ObjectFolders)
register_layout("color_maps", ColorMaps)
register_layout("cityscapes", Cityscapes)
register_layout("ade20k", Ade20k)
register_layout("coco_panoptic", CocoPanoptic)  # says more than the instances or label maps beside it
register_layout("labelme", LabelMe)
register_layout("folder", SegmentationFolder)
register_layout("coco_instances", CocoInstances)


def open_dataset(
    root: str | Path, split: str | None = None, layout: str | None = None, cache: bool = False, **options: Any
) -> SegmentationDataset:
    """The annotated images of a split.

    Args:
        root: folder of the data.
        split: such as "train"; None where there are no splits.
        layout: of an annotation tool "yolo", "cvat", "label_studio", "supervisely", "voc", "geo", "mask_files",
            "object_folders", "color_maps" or "labelme"; else "cityscapes", "ade20k", "coco_panoptic", "folder",
            "coco_instances" or one of [`register_layout`]. None: the first, in the order in which they are registered,
            whose files are there.
        cache: keep what was read in memory.
        options: of the layout's reader, such as `background="class"` of [`CocoInstances`].

    Raises:
        FileNotFoundError: there is no such folder, or it has no known layout; the message lists what was looked for.
        ValueError: an unknown layout; what the reader finds wrong.
        TypeError: an option that the reader does not have.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder, mode in (("images", "RGB"), ("labels", "L")):
        ...     (root / "train" / folder).mkdir(parents=True)
        ...     Image.new(mode, (8, 6)).save(root / "train" / folder / "street.png")
        >>> _ = (root / "labels.json").write_text('{"0": "road", "1": "sky"}')
        >>> data = open_dataset(root, "train")
        >>> data.names, data.id2label, data[0]["segments"].size
        (['street'], {0: 'road', 1: 'sky'}, (6, 8))
    """
    root = Path(root)
    require_folder(root, "data set")
    was_found = layout is None
    layout = find_layout(root, split) if layout is None else layout
    reader = layout_class(layout)
    try:
        return reader(root, split, cache=cache, **options)  # type: ignore[arg-type]  # as subclasses have it
    except TypeError as error:
        raise TypeError(f"Layout {layout} of {root}: {error}") from error
    except (FileNotFoundError, ValueError) as error:
        if not (was_found and reader.found_by_common_names):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error} (Layout {layout} was found by looking at the names of the folders.)") from error


def layout_class(layout: str) -> type[SegmentationDataset]:
    """The class of a layout.

    Raises:
        ValueError: there is no such layout; lists those that there are.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: the layouts are {', '.join(LAYOUTS)}.")
    known: type[SegmentationDataset] = LAYOUTS[layout]
    return known


def find_layout(root: Path, split: str | None) -> str:
    """Name of the layout of a split, the first whose files are there.

    Raises:
        FileNotFoundError: none is known.
    """
    for name, layout in LAYOUTS.items():
        if layout.find(root, split, {}):
            return name
    looked = "\n".join(
        f"  {name}: {', '.join(str(path.relative_to(root)) for path in places)}"
        for name, layout in LAYOUTS.items()
        if (places := layout.places(root, split))
    )
    there = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"No known layout in {root}, split {split}. Looked below it for\n{looked}\nIt holds: {there}."
    )


def find_splits(
    root: Path, layout: str | None, splits: Sequence[str | None], options: Mapping[str, Any]
) -> tuple[str | None, list[str | None]]:
    """Layout and splits of a folder, training first, where they are not given.

    A split may lack images or labels.

    Args:
        root: folder of the data.
        layout: its name; None: looked for.
        splits: their names; empty: looked for.
        options: of the layout's reader.

    Returns:
        Name of the layout and of the splits, [None] for data without splits; (None, ...) or (..., []): none is known.
    """
    names = [layout] if layout else list(LAYOUTS)

    def is_found(name: str, split: str | None) -> bool:
        return bool(LAYOUTS[name].find(root, split, options))

    def is_part(name: str, split: str | None) -> bool:
        known = LAYOUTS[name]
        return bool(split or not known.always_split) and any(path.is_dir() for path in known.places(root, split))

    if splits:
        looks: list[Callable[[str, str | None], bool]] = [is_found, is_part]
        found = (name for look in looks for name in names if any(look(name, split) for split in splits))
        return layout or next(found, None), list(dict.fromkeys(splits))
    candidates = {name: set(LAYOUTS[name].splits(root, options)) for name in names}
    for name in names:
        there = {split for split in candidates[name] if is_found(name, split)}
        if there:
            return name, [*sorted(there | {s for s in candidates[name] if is_part(name, s)}, key=_rank)]
        if is_found(name, None):
            return name, [None]
    for name in names:
        parts = {split for split in candidates[name] if is_part(name, split)}
        if parts or is_part(name, None):
            return name, [*sorted(parts, key=_rank)] or [None]
    return layout, []


def _rank(split: str) -> tuple[int, str]:
    place = next((i for i, name in enumerate(_FIRST_SPLITS) if split.startswith(name)), len(_FIRST_SPLITS))
    return place, split


__all__ = [
    "LAYOUTS",
    "Ade20k",
    "Cityscapes",
    "CocoInstances",
    "CocoPanoptic",
    "SegmentationFolder",
    "SegmentationStream",
    "SegmentationTable",
    "find_layout",
    "find_splits",
    "layout_class",
    "open_dataset",
    "register_layout",
]

"""Cityscapes: fine annotations as class maps, or as instances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...utils.places import no_folder, require_folder
from ..checks import ReportFault, refuse, shown_path
from ..files import folders_in, some
from .label_maps import VOID_VALUES, FilePair, LabelMapDataset

# Label id of the files -> name: the 19 classes that are evaluated, in the order of their train ids.
CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_THINGS = (24, 25, 26, 27, 28, 31, 32, 33)
OTHERS = sorted(set(range(34)) - set(CLASSES))  # label ids that are not evaluated: void
_IMAGE_ENDING = "_leftImg8bit.png"
_TRAIN_IDS = dict(enumerate(CLASSES.values()))
_PER_LABEL = 1000  # an id in instanceIds is 1000 * label id + number; below 1000 a label id


class Cityscapes(LabelMapDataset):
    """Street scenes with 19 classes.

    Layout::

        ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
        ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png       or ..._labelTrainIds.png
        ROOT/gtFine/SPLIT/CITY/NAME_gtFine_instanceIds.png    for `instances`

    Args:
        root: folder that holds leftImg8bit and gtFine.
        split: "train", "val" or "test".
        instances: things and stuff instead of class maps. Pixels of a thing class that belong to no single instance
            are a crowd region, as in Cityscapes' own panoptic files.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: a folder or a file is missing.
        ValueError: no images, or (on access) a file that cannot be read or has unknown labels.
    """

    always_split = True
    split_folders = "leftImg8bit/{split}"
    unknown_ids = "has ids {}, whose labels Cityscapes does not have."

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        *,
        instances: bool = False,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        root = Path(root)
        require_folder(root, "data set")
        images, labels = self.places(root, split)
        for kind, folder in (("image", images), ("label", labels)):
            if not folder.is_dir():
                available = folders_in(folder.parent) if folder.parent.is_dir() else None
                error = no_folder(folder, "Cityscapes", available)
                report("missing_folder", f"no folder of {kind} files", folder, error)
        paths = sorted(images.glob(f"*/*{_IMAGE_ENDING}"))
        if not paths:
            looked = f"No images in {images} (looked for CITY/NAME{_IMAGE_ENDING})."
            report("no_images", f"no CITY/NAME{_IMAGE_ENDING}", images, ValueError(looked))
        endings = ["instanceIds"] if instances else ["labelIds", "labelTrainIds"]
        found = {ending: [_label_path(path, labels, ending) for path in paths] for ending in endings}
        ending = next((e for e in endings if any(path.is_file() for path in found[e])), endings[0])
        missing = {path: image for path, image in zip(found[ending], paths, strict=True) if not path.is_file()}
        error = FileNotFoundError(f"{len(missing)} label maps are missing: {some([str(path) for path in missing])}.")
        for path, image in missing.items():
            report("image_without_label", f"no {shown_path(path, root)}", image, error)
        files: list[FilePair] = [
            (i, None if label in missing else label) for i, label in zip(paths, found[ending], strict=True)
        ]
        if report is not refuse:  # which would be an error
            for path in sorted(set(labels.glob(f"*/*_gtFine_{ending}.png")) - set(found[ending])):
                report("label_without_image", "no image of this name", path)
                files.append((None, path))
        names, void = (_TRAIN_IDS, []) if ending == "labelTrainIds" else (CLASSES, OTHERS)
        if instances:
            stuff = set(CLASSES) - set(_THINGS)
            super().__init__(root, files, CLASSES, {*OTHERS, *VOID_VALUES}, "panoptic", stuff, cache, report)
        else:
            super().__init__(root, files, names, void, cache=cache, report=report)
        self.names = [name.removesuffix("_leftImg8bit") for name in self.names]

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The two folders leftImg8bit/SPLIT and gtFine/SPLIT."""
        return [root / "leftImg8bit" / (split or ""), root / "gtFine" / (split or "")]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether both folders are there."""
        return all(path.is_dir() for path in cls.places(root, split))

    def label_of(self, value: int) -> int | None:
        """Label id of a value; those of instances are 1000 * label id + number."""
        if self.kind == "semantic" or not _PER_LABEL <= value < VOID_VALUES[1]:
            return super().label_of(value)
        return super().label_of(value // _PER_LABEL)

    def is_crowd(self, value: int) -> bool:
        """Whether a value of an instance map is the label id of a class of things: pixels of several instances."""
        return self.has_instances and value in _THINGS  # without a number, so of several


def _label_path(image: Path, labels: Path, ending: str) -> Path:
    return labels / image.parent.name / f"{image.name.removesuffix(_IMAGE_ENDING)}_gtFine_{ending}.png"

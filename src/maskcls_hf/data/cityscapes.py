"""Cityscapes: fine annotations as class maps, or as instances."""

from __future__ import annotations

from pathlib import Path

from .dataset import Targets
from .files import int32_ids, require_folder, some, unique_ids
from .folder_dataset import VOID_VALUES, LabelMapDataset
from .sample import VOID

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
THINGS = (24, 25, 26, 27, 28, 31, 32, 33)
OTHERS = sorted(set(range(34)) - set(CLASSES))  # label ids that are not evaluated: void
PER_LABEL = 1000  # an id in instanceIds is 1000 * label id + number; below 1000 a label id


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

    Raises:
        FileNotFoundError: a folder or a file is missing.
        ValueError: no images, or (on access) a file that cannot be read or has unknown labels.
    """

    def __init__(self, root: str | Path, split: str | None = "train", *, instances: bool = False, cache: bool = False):
        root = Path(root)
        images = root / "leftImg8bit" / (split or "")
        labels = root / "gtFine" / (split or "")
        require_folder(root, "data set")
        for folder in (images, labels):
            available = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else None
            require_folder(folder, "Cityscapes", available)
        paths = sorted(images.glob("*/*_leftImg8bit.png"))
        if not paths:
            raise ValueError(f"No images in {images} (looked for CITY/NAME_leftImg8bit.png).")
        endings = ["instanceIds"] if instances else ["labelIds", "labelTrainIds"]
        found = {ending: [_label_path(path, labels, ending) for path in paths] for ending in endings}
        ending = next((ending for ending in endings if found[ending][0].is_file()), endings[0])
        if missing := [str(path) for path in found[ending] if not path.is_file()]:
            raise FileNotFoundError(f"{len(missing)} label maps are missing: {some(missing)}.")
        train_ids = dict(enumerate(CLASSES.values()))
        super().__init__(
            list(zip(paths, found[ending], strict=True)),
            train_ids if ending == "labelTrainIds" else CLASSES,
            () if ending == "labelTrainIds" else OTHERS,
            cache,
        )
        self.names = [path.stem.removesuffix("_leftImg8bit") for path in paths]
        if instances:
            self.kind, self.has_instances = "panoptic", True
            self.stuff_ids = [self.class_of_label[label] for label in CLASSES if label not in THINGS]

    def _read_targets(self, index: int, size: tuple[int, int]) -> Targets:
        if not self.has_instances:
            return super()._read_targets(index, size)
        ids = int32_ids(self.raw_map(index), self.annotation(index))
        present = unique_ids(ids)
        label_of = {i: i // PER_LABEL if PER_LABEL <= i < VOID_VALUES[1] else i for i in present}
        if wrong := [i for i, label in label_of.items() if label not in (*CLASSES, *OTHERS, *VOID_VALUES)]:
            raise ValueError(f"{self.annotation(index)} has ids {some(wrong)}, whose labels Cityscapes does not have.")
        classes: dict[int, int | None] = {i: self.class_of_label.get(label, VOID) for i, label in label_of.items()}
        return Targets(ids, classes, [i for i, label in label_of.items() if i < PER_LABEL and label in THINGS])


def _label_path(image: Path, labels: Path, ending: str) -> Path:
    name = image.name.removesuffix("_leftImg8bit.png")
    return labels / image.parent.name / f"{name}_gtFine_{ending}.png"

"""Survey of the Cityscapes layout."""

from __future__ import annotations

from ..cityscapes import CLASSES, OTHERS, PER_LABEL, THINGS
from ..folder_dataset import VOID_VALUES
from .survey import Item, MapSurvey

IMAGE_ENDING = "_leftImg8bit.png"


class CityscapesSurvey(MapSurvey):
    """`Cityscapes`."""

    def look(self) -> None:
        images = self.root / "leftImg8bit" / (self.split or "")
        labels = self.root / "gtFine" / (self.split or "")
        for kind, folder in (("image", images), ("label", labels)):
            if not folder.is_dir():
                self.find("missing_folder", f"no folder of {kind} files", folder)
        paths = sorted(images.glob(f"*/*{IMAGE_ENDING}"))
        if not paths:
            self.find("no_images", f"no CITY/NAME{IMAGE_ENDING}", images)
        ending = self._ending([path.name for path in labels.glob("*/*.png")])
        self.classes = dict(enumerate(CLASSES.values())) if ending == "labelTrainIds" else dict(CLASSES)
        self.void_values = {*VOID_VALUES, *(() if ending == "labelTrainIds" else OTHERS)} - set(self.classes)
        if ending == "instanceIds":
            self.kind, self.stuff = "panoptic", set(CLASSES) - set(THINGS)
        expected = set()
        for path in paths:
            name = path.name.removesuffix(IMAGE_ENDING)
            label = labels / path.parent.name / f"{name}_gtFine_{ending}.png"
            expected.add(label)
            if not label.is_file():
                self.find("image_without_label", f"no {self.shown(label)}", path)
            self.items.append(Item(path, label if label.is_file() else None))
        for label in sorted(set(labels.glob(f"*/*_gtFine_{ending}.png")) - expected):
            self.find("label_without_image", "no image of this name", label)
            self.items.append(Item(None, label))

    def _ending(self, names: list[str]) -> str:
        if self.options.get("instances"):
            return "instanceIds"
        train_ids = any(name.endswith("_labelTrainIds.png") for name in names)
        return "labelTrainIds" if train_ids and not any(n.endswith("_labelIds.png") for n in names) else "labelIds"

    def segment_of(self, value: int) -> tuple[int | None, bool]:
        if self.kind == "semantic":
            return super().segment_of(value)
        label = value // PER_LABEL if value >= PER_LABEL else value
        found, _ = super().segment_of(label)
        return found, value < PER_LABEL and label in THINGS

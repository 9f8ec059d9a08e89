"""Folders of images with label maps or instance maps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...utils.places import no_folder, require_folder
from ..checks import ReportFault, is_binary, refuse
from ..dataset import Kind
from ..files import checked_names, folders_in, read_class_names, read_json, shown, some, with_split
from .label_maps import LabelMapDataset, as_values, pair_files

_LABEL_FOLDERS = ("labels", "semantic", "instances")


class SegmentationFolder(LabelMapDataset):
    """Annotated images of one split.

    Layout::

        ROOT/labels.json              {"0": "sky", ...}: names of the classes
        ROOT/SPLIT/images/NAME.jpg    any format that Pillow reads
        ROOT/SPLIT/labels/NAME.png    class ids, 255 (or 65535) where not annotated     (semantic), or
        ROOT/SPLIT/instances/NAME.png 0 = background, every other id one segment         (instances)

    With instances, `labels.json` names one class of things. Background then is class 0, one stuff segment an
    image, and the things are class 1. `labels` may also be called `semantic`. Names are also read from Mapillary's
    `config.json`.

    Args:
        root: folder that holds `labels.json` and the splits.
        split: name of the split's folder, such as `"train"`; None where there are no splits.
        image_folder: where the images lie below the root, such as `"images/{split}"`.
        label_folder: where the label files lie below the root; None: beside the images, in `labels`, `semantic` or
            `instances`.
        instances: whether the label files hold instances; None: if their folder is called so.
        id2label: names of the classes by label value, or a JSON file of them; None: `labels.json`.
        void_values: label values that are void: beside 255 and 65535 in maps of classes, alone in maps of instances
            (255 for the border in Pascal VOC's SegmentationObject).
        background: name of class 0 of instance data.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].

    Raises:
        FileNotFoundError: a folder, `labels.json`, a label map or an image is missing.
        ValueError: no images, two images of one name, no class names, or (on access) a file that cannot be
            read, a label map of another size than its image, in color, or with values that are no class.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None,
        *,
        image_folder: str = "{split}/images",
        label_folder: str | None = None,
        instances: bool | None = None,
        id2label: Mapping[int, str] | str | Path | None = None,
        void_values: Collection[int] = (),
        background: str = "background",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        root, self.split = Path(root), split
        require_folder(root, "data set")
        images = _below(root, image_folder, split)
        if not images.is_dir():
            no_split = split and "{split}/" in str(image_folder) and not (root / split).is_dir()
            missing = (root / str(split), "split") if no_split else (images, "image")
            report("missing_folder", "no folder of image files", images, no_folder(*missing, folders_in(root)))
        given = _below(root, label_folder, split) if label_folder else None
        labels = _label_folder(root, images.parent, given, report)
        names, void, has_instances = self._read_classes(root, labels, id2label, void_values, instances, report)
        if has_instances:
            names = {0: background, 1: next(iter(names.values()), "thing")}
        elif background != "background":
            wrong = f"background={background!r} names class 0 of instance maps; {labels} holds maps of classes."
            report("bad_class_names", wrong)
        kind: Kind = "panoptic" if has_instances else "semantic"
        files = pair_files(images, labels, root, report)
        super().__init__(root, files, names, void, kind, [0] if has_instances else None, cache, report)
        self.expects_things = has_instances

    def _read_classes(
        self, root: Path, labels: Path, id2label: Any, void_values: Any, instances: Any, report: ReportFault
    ) -> tuple[dict[int, str], set[int], bool]:
        """Names of the classes, values that are void, and whether the files hold instances."""
        try:
            names, no_classes = self.class_names_of(root, id2label)
            void = as_values(void_values)
            has_instances = _holds_instances(labels, instances)
        except (OSError, ValueError) as error:
            report("bad_class_names", str(error), error=error)
            return {}, set(), False
        if not has_instances:
            return names, {*void, *no_classes}, False
        if len(names) != 1:
            message = f"{len(names)} classes, but instance maps have one class of things"
            one_class = ValueError(
                f"{id2label or root / 'labels.json'} names {len(names)} classes, but an instance map tells "
                "only background from one class of things: name that one class."
            )
            report("bad_class_names", message, error=one_class)
        return names, void, True

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The folder of the images and those of label files."""
        return [root / (split or "") / name for name in ("images", *_LABEL_FOLDERS)]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether there are a folder of images and one of label files; or that of the option `image_folder`."""
        if options.get("image_folder"):
            return bool(split) and _below(root, str(options["image_folder"]), split).is_dir()
        images, *labels = cls.places(root, split)
        return images.is_dir() and any(path.is_dir() for path in labels)

    @staticmethod
    def class_names_of(root: Path, id2label: Any) -> tuple[dict[int, str], list[int]]:
        """Names of the classes by label value, and values named as no class (in Mapillary's config.json)."""
        path = root / "config.json"
        if id2label is not None or (root / "labels.json").is_file() or not path.is_file():
            return read_class_names(root / "labels.json" if id2label is None else id2label), []
        content = read_json(path)
        labels = content.get("labels") if isinstance(content, dict) else None
        if not isinstance(labels, list):
            raise ValueError(
                f"{path} is not Mapillary's, with a list of labels, and there is no {root / 'labels.json'}."
            )
        for place, label in enumerate(labels):
            if not isinstance(label, dict) or not isinstance(label.get("evaluate"), bool) or "readable" not in label:
                raise ValueError(
                    f"{path} is not Mapillary's, with readable and evaluate (true or false) of each of its labels: "
                    f"labels[{place}] is {shown(label)}. Or write {root / 'labels.json'}."
                )
        names = checked_names(
            ((i, label["readable"]) for i, label in enumerate(labels) if label["evaluate"]), str(path)
        )
        if not names:
            raise ValueError(f"{path} names no classes: evaluate is false of all its labels.")
        return names, sorted(set(range(len(labels))) - set(names))

    def label_of(self, value: int) -> int | None:
        """The value itself in maps of classes; in maps of instances class 0 for background, 1 for every other id."""
        if self.kind == "semantic" or value in self.void_values:
            return super().label_of(value)
        if not 0 <= value < 2**31:
            raise KeyError(value)
        return int(value != 0)

    def check_values(self, values: set[int]) -> Iterator[tuple[str, str]]:
        """Also masks of 0 and 255, and instance maps in which 255 may be a border."""
        yield from super().check_values(values)
        if 255 not in values:
            return
        is_void = 255 in self.void_values
        if self.kind == "semantic" and is_binary(values, self.class_names):
            yield "mask_255", "the files have no other values than 0, 255, and 255 is read as unlabeled"
        if self.kind != "semantic" and not is_void and 254 not in values:
            others = some(sorted(values - {0, 255})) or "none"
            yield "mask_255", f"255 is read as an instance; the other ids are {others}"


def _below(root: Path, pattern: str, split: str | None) -> Path:
    """`"images/{split}"` -> the folder below the root; without a split, the pattern without it."""
    return root / with_split(pattern, split).strip("/")


def _label_folder(root: Path, folder: Path, given: Path | None, report: ReportFault) -> Path:
    """The folder of label files: `given`, or the one beside the images in `folder`."""
    none = "no folder of label files"
    if given is not None:
        if not given.is_dir():
            available = folders_in(given.parent) if given.parent.is_dir() else None
            report("missing_folder", none, given, no_folder(given, "label", available))
        return given
    there = [folder / name for name in _LABEL_FOLDERS if (folder / name).is_dir()]
    labels = there[0] if there else folder / _LABEL_FOLDERS[0]
    if len(there) != 1:
        names = [path.name for path in there]
        error = FileNotFoundError(
            f"{folder} needs one of the folders {', '.join(_LABEL_FOLDERS)} beside images, found: "
            f"{', '.join(names) or 'none'}. Where there are several or others, choose with label_folder, for instance "
            "'{split}/labels'."
        )
        several = f"{' and '.join(names)} are there: choose with label_folder in the recipe"
        report("missing_folder", several if names else none, folder if names else labels, error)
    return labels


def _holds_instances(labels: Path, instances: Any) -> bool:
    """Whether a folder of label maps holds instances: as `instances` says, or its name."""
    if instances is not None and not isinstance(instances, bool):
        raise ValueError(f"instances={instances!r}: needs true or false.")
    return labels.name == "instances" if instances is None else instances
